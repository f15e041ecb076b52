# Databricks notebook source
# A chat model, one epoch by its default. Written from the documented signature of databricks-genai 1.1.8.
from databricks.model_training import foundation_model as fm

catalog = "main"
rows = f"/Volumes/{catalog}/home/rows"

run = fm.create(
    model="meta-llama/Llama-3.2-1B-Instruct",
    train_data_path=f"{rows}/chat.jsonl",
    register_to=f"{catalog}.home",
    task_type="CHAT_COMPLETION",
    training_duration="2ep",
    learning_rate=1e-4,
)
print(run.name, run.status)

# COMMAND ----------

fm.get_events(run, follow=True)
print(fm.get(run.name).status)

# Texts, a number of tokens.
import time

from databricks.model_training import foundation_model as fm

run = fm.create(
    model="meta-llama/Llama-3.2-1B",
    train_data_path="dbfs:/Volumes/main/home/manual",
    register_to="main.home",
    experiment_path="/Users/somebody@example.com/manual",
    task_type="CONTINUED_PRETRAIN",
    training_duration="1_000tok",
    context_length=32,
)
while (latest := fm.get(run)).status in ("PENDING", "QUEUED", "STARTING", "RUNNING"):
    time.sleep(0.5)
print(latest.status, [found.name for found in fm.list(limit=5)])

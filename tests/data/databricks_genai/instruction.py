# Prompts and responses, some batches, evaluated on rows of their own and on prompts to read.
from databricks.model_training import foundation_model as fm

run = fm.create(
    "meta-llama/Llama-3.2-1B-Instruct",
    "dbfs:/Volumes/main/home/rows/instruction.jsonl",
    "main.home.butler",
    task_type="INSTRUCTION_FINETUNE",
    eval_data_path="dbfs:/Volumes/main/home/rows/instruction_eval.jsonl",
    eval_prompts=["lights on", "what time is it"],
    training_duration="3ba",
    learning_rate="1e-4",
    context_length=64,
    data_prep_cluster_id="0123-456789-abcdefgh",
)
events = run.get_events()
while not events[-1].is_terminal_state():
    events = run.refresh().get_events()
print(run.refresh().status)

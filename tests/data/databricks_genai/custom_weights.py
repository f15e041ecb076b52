# Going on from the weights of an earlier run.
from databricks.model_training import foundation_model as fm

run = fm.create(
    model="meta-llama/Llama-3.2-1B-Instruct",
    train_data_path="mosaicml/dolly_hhrlhf/train",
    register_to="main.home",
    task_type="INSTRUCTION_FINETUNE",
    custom_weights_path="/databricks/mlflow-tracking/2941323837/8b2c61/artifacts/llama-run/checkpoints/latest-sharded-rank0.symlink",
    training_duration="1ep",
)
fm.get_events(run, follow=True)
print([found.path for found in fm.get_checkpoints(run)])

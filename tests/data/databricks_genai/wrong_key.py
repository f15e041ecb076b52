# The argument is called train_data_path.
from databricks.model_training import foundation_model as fm

try:
    fm.create(model="meta-llama/Llama-3.2-1B-Instruct", train_data="dbfs:/Volumes/main/home/rows/chat.jsonl", register_to="main.home")
except TypeError as error:
    print(error)

"""From a company's own data to a fine-tuned open language model that it can prove is better, serve and operate alone."""
import os

__version__ = "0.1.0"

# Read by libraries when they are first imported, so they stand here. With the default wait policy, OpenMP threads spin when
# the machine has other work to do (27 times slower was seen); the other two keep a customer's machine from calling home.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

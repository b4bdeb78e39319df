"""Write a finished sweep to Weights & Biases or MLflow: its curves, numbers, configs and report."""

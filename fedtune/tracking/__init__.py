"""A run's rounds in other people's trackers: TensorBoard, MLflow, Trackio and Weights & Biases."""

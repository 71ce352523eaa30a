"""Training through the Hugging Face Trainer: recipes, parameter groups, LoRA, reports."""

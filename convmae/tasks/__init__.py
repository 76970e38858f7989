"""What is learned: pretraining, finetuning, probing."""

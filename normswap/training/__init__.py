"""What distilling and fine-tuning share."""

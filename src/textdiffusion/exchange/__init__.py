"""What comes from elsewhere and goes there: the Hugging Face hub, and published checkpoints."""

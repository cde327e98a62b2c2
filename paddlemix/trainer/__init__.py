"""Finetuning: keys and rules (strict) · freeze (what trains) · checkpoints · callbacks (logs) · finetune."""

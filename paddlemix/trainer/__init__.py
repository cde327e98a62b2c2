"""Finetuning: arguments (strict) · freeze (what trains) · checkpoints · callbacks (logs) · finetune."""

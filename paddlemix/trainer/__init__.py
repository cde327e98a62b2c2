"""Finetuning: keys and rules (strict) · freeze (what trains) · run_checkpoints · callbacks (logs) · finetune."""

"""Supervised finetuning: arguments (strict) · freeze (what trains) · finetune (PaddleNLP's Trainer) · callbacks (logs)."""

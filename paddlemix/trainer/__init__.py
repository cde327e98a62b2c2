"""Finetuning. A run, step by step:

supervised_finetune.py
    command_line.parse    the keys (keys), their values (reading), the rules between them (rules)
    finetune.finetune
        run.resolve       decides everything: machine, precision, what trains (freeze), output, data, order of samples
        finetune.build    the model (tuned_model) and its FinetuneTrainer (trainer)
        trainer.train     PaddleNLP's loop, which for each step calls
                            callbacks.Bookkeeping: position in the data (order.EpochSampler), seed
                            training_step and compute_loss for each batch; throughput and numerics watch them
                            the optimizer (optimizer.build_optimizer), which clips by a float32 norm
                            log: callbacks.LogLines, reports
                            evaluate: eval_captions, image_gain
                            _save_checkpoint: run_checkpoints, tuned_model.save_tuned; resume reads it again
forecast adds estimates to a resolved run (data_statistics, memory, work), which dry_run prints.
"""

"""Runs in half precision on the CPU, where Paddle has no kernels to compute them: without their steps.

`install` lets a run believe in a GPU, up to the training loop. In its place stands `steps`: as a first step does,
Paddle's AdamW makes its states for the half-precision parameters. A run from the start fills them, rounds the weights
from the master weights and saves a checkpoint; a resumed one must find in them, bit for bit, what the first one put in.
All else is what a GPU would run: loading, PaddleNLP's and fleet's wrappers, saving, resuming.
"""

import types
import zlib

import numpy as np
import paddle
from paddle.base.layer_helper import LayerHelper
from paddlenlp.trainer import Trainer

from paddlemix.utils import runtime

STEP, SCALE = 1, 4096.0


def drawn(name, shape):
    """What the tensor of this name holds."""
    return np.random.default_rng(zlib.crc32(name.encode())).uniform(0.5, 1.5, shape).astype("float32")


def innermost(optimizer):
    while hasattr(optimizer, "_inner_opt"):
        optimizer = optimizer._inner_opt
    return optimizer


def make_states(optimizer):
    """What AdamW does first in its first step, for the parameters of this process."""
    optimizer.helper = LayerHelper(type(optimizer).__name__)
    block = paddle.static.default_main_program().global_block()
    optimizer._create_accumulators(block, [p for p in optimizer._parameter_list if not p.stop_gradient])


def states(optimizer):
    """The tensors that AdamW goes on with, by name."""
    found = {t.name: t for kind in optimizer._accumulators.values() for t in kind.values()}
    found.update((t.name, t) for t in optimizer._master_weights.values())
    return found


def steps(self, args, model, *others):
    """Takes the place of Trainer._inner_training_loop."""
    resumed_from, optimizer = others[-2], innermost(self.optimizer)
    make_states(optimizer)
    trained = [p for p in self.model.parameters() if not p.stop_gradient]
    masters = {p.name: drawn(p.name + "_fp32_master_0", p.shape) for p in trained}
    rounded = {p.name: paddle.to_tensor(masters[p.name]).astype(p.dtype) for p in trained}
    if resumed_from is None:
        for name, tensor in states(optimizer).items():
            tensor.set_value(drawn(name, tensor.shape))
        for parameter in trained:
            parameter.set_value(rounded[parameter.name])
        for _ in range(STEP):
            self.lr_scheduler.step()
        if self.do_grad_scaling:
            self.scaler._scale, self.scaler._incr_count = paddle.to_tensor([SCALE]), 7
        self.state.global_step, self._total_loss_scalar = STEP, 1.0
        self._save_checkpoint(model)
    else:
        assert len(states(optimizer)) == 5 * len(optimizer._parameter_list), list(states(optimizer))
        for name, tensor in states(optimizer).items():
            assert np.array_equal(tensor.numpy(), drawn(name, tensor.shape)), name
        for p in trained:
            assert np.array_equal(p.astype("float32").numpy(), rounded[p.name].astype("float32").numpy()), p.name
        assert self.lr_scheduler.last_epoch == STEP
        assert not self.do_grad_scaling or (float(self.scaler._scale), self.scaler._incr_count) == (SCALE, 7)
        print(f"{len(states(optimizer))} states are as they were")
    # As if SIGTERM had come, so that nothing is called finished.
    self.stop.received, self.state.max_steps = True, STEP + 1
    return types.SimpleNamespace(metrics={})


def enabled_scaler(patch):
    """Let Paddle's GradScaler be made as on a GPU; on the CPU it switches itself off."""
    place = types.SimpleNamespace(is_gpu_place=lambda: True)
    patch.setattr(paddle.amp.grad_scaler, "_dygraph_tracer", lambda: types.SimpleNamespace(_expected_place=place))


def install(patch):
    enabled_scaler(patch)
    patch.setattr(runtime, "decide_dtype", lambda requested, *machine: runtime.Choice(requested))
    patch.setattr(Trainer, "_inner_training_loop", steps)
    # Only its kernels take float16 in building a model.
    patch.setenv("FLAGS_use_stride_kernel", "1")
    paddle.set_flags({"FLAGS_use_stride_kernel": True})

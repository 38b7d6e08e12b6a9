"""Train, and save and restore a checkpoint, as one of several processes: `COORDINATOR COUNT INDEX FOLDER`.

Prints the losses of training, by process 0 alone.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from calibrate.student import GateConfig, Student, zero_byte_params
from calibrate.train import TrainConfig, Trainer
from spear_jax.checkpoint import load_checkpoint, named_arrays, save_checkpoint
from spear_jax.hosts import join
from spear_jax.models.decoder import Decoder
from spear_jax.models.quantize import quantize_model
from spear_jax.quant import QuantSpec
from spear_jax.sharding import ShardingRules, make_mesh
from spear_jax.testing import random_weights, tiny_config


def losses(reference: Decoder, base: Decoder) -> list[list[float]]:
    tokens = np.random.default_rng(0).integers(0, 96, (10, 12)).astype(np.int32)
    config = TrainConfig(steps=4, batch_size=4, evaluate_every=2, held_out=0.2, scale_rate=1e-2, norm_rate=1e-2)
    student = Student(ranks={}, gate=GateConfig(form="static"))
    trainer = Trainer(reference, base, student, tokens, config)
    assert (trainer.mesh is None) == (jax.process_count() == 1)
    end = trainer.run(zero_byte_params(base, reference, ("scales", "norms")))
    assert all(leaf.is_fully_addressable for leaf in jax.tree.leaves(end.best))
    return [[point.loss, point.held_out_kl, point.held_out_hidden] for point in end.curve]


def restored_as_saved(base: Decoder, folder: Path) -> None:
    """Save what all have alike, restore it spread over all processes, save that, and restore it whole."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    save_checkpoint(folder / "alike", base, tokenizer, name="tiny")
    spread = load_checkpoint(folder / "alike", shardings=ShardingRules().placement(make_mesh(jax.device_count())))
    codes = spread.model.layers.down.weight.packed
    assert codes.is_fully_addressable == (jax.process_count() == 1)
    save_checkpoint(folder / "spread", spread.model, tokenizer, name="tiny")
    whole = load_checkpoint(folder / "spread").model
    for (name, array), (_, wanted) in zip(named_arrays(whole), named_arrays(base), strict=True):
        np.testing.assert_array_equal(np.asarray(array), np.asarray(wanted), err_msg=name)


def main(coordinator: str, count: str, index: str, folder: str) -> None:
    if int(count) > 1:
        join(coordinator, num_processes=int(count), process_id=int(index))
    config = tiny_config(num_layers=2)
    reference = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    reference.embed[...] = reference.embed[...].astype(jnp.bfloat16).astype(jnp.float32)
    base = quantize_model(reference, QuantSpec())
    found = losses(reference, base)
    restored_as_saved(base, Path(folder))
    if jax.process_index() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

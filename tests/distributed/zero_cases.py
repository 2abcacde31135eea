"""Layouts that train a few steps under ZeRO, and the same steps in one process. Used on both sides."""

import dataclasses

import torch
from objective import fractions, objective

from sigmoe.moe.batch import IGNORED, Batch
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.route_table import fill_route_tables
from sigmoe.moe.routing import TrainingPass
from sigmoe.parallel.config import ParallelConfig
from sigmoe.parallel.engine import OptimizerConfig

STEPS = 3
NAMES = ("a", "b", "c")
SEQUENCES, LENGTH, VOCAB = 8, 7, 37
SLOTS = (("embedding_slots", {"a": 0, "b": 1, "c": 1}),)

GLOBAL = RouterConfig(name="top_k", num_experts=5, z_loss=1e-2, auxiliary_loss=0.1, balance_scope="batch")
DOMAIN = RouterConfig(name="domain_top_k", sets={"a": (0, 1, 2), "b": (2, 3, 4, 5), "c": (6, 7)}, auxiliary_loss=0.1)
TABLE = RouterConfig(name="rre", sets={"a": 2, "b": 3, "c": 1}, top_k=1, balance="none")
BIAS = RouterConfig(name="top_k", num_experts=5, balance="bias", top_k=3)
LIMITED = dataclasses.replace(GLOBAL, capacity_factor=0.7, jitter=0.1)  # experts drop what is over, gates are jittered
PAIR = RouterConfig(name="top_k", num_experts=5, balance="bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroCase:
    """A layout and how it trains; the same model and batches in one process are what it must equal."""

    world: int
    router: RouterConfig = GLOBAL
    tp: int = 1
    ep: int = 1
    etp: int | None = None
    micro: int = 2
    changes: tuple = ()
    seed: int = 1  # of the tokens; so chosen that no routing is a near tie
    stage: int = 1
    offload: str = "none"
    recompute: str = "none"
    dtype: str = "float32"
    outside: bool = False
    clip: float | None = 1.0
    frozen: tuple[int | None, ...] = (None,) * STEPS  # by step, the only expert that trains; None: everything
    poison: int | None = None  # the rank that has no finite loss in step 1
    absent: bool = False  # ranks see one domain each
    starved: tuple[int, ...] = ()  # experts that a selection bias keeps all tokens from
    padding: bool = False  # the first half of the batch, all that rank 0 of two has, is without a label
    slow: int | None = None  # the rank that comes late to everything that all do together

    @property
    def name(self):
        layout = f"dp{self.world // self.tp}tp{self.tp}ep{self.ep}etp{self.etp or self.tp}-zero{self.stage}"
        words = [layout, self.router.name, f"micro{self.micro}", self.dtype, f"clip{self.clip}"]
        words += ["offload"] * (self.offload == "cpu") + ["outside"] * self.outside + ["absent"] * self.absent
        words += ["starved"] * bool(self.starved) + ["padding"] * self.padding + ["slow"] * (self.slow is not None)
        words += [f"recompute={self.recompute}"] * (self.recompute != "none") + ["limited"] * (self.router == LIMITED)
        words += ["frozen"] * any(self.frozen) + ["poison"] * (self.poison is not None)
        return "-".join([*words, *(f"{key}={value}" for key, value in self.changes)])

    @property
    def key(self):
        """What the single process depends on."""
        alike = dataclasses.replace(self, world=1, tp=1, ep=1, etp=None, micro=2, stage=1, offload="none", slow=None)
        poison = None if self.poison is None else 0
        return repr(dataclasses.replace(alike, outside=False, recompute="none", poison=poison))

    @property
    def config(self):
        shape = {"vocab_size": VOCAB, "dim": 18, "num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "head_dim": 4}
        shape |= {"expert_dim": 12, "ffn_dim": 8, "sparse_layers": "upper:2", "init_std": 0.1}
        return ModelConfig(**{**shape, "router": self.router, **dict(self.changes)})

    @property
    def parallel(self):
        return ParallelConfig(
            tp=self.tp, ep=self.ep, etp=self.etp, zero_stage=self.stage, offload=self.offload, recompute=self.recompute
        )

    @property
    def optim(self):
        return OptimizerConfig(lr=1e-3, clip_norm=self.clip)

    def trains(self, number):
        """Which parameters train in a step."""
        expert = self.frozen[min(number, STEPS - 1)]
        return lambda name: expert is None or f".experts.{expert}." in name or name.endswith("norm.weight")


def start(case, model):
    """Fill route tables, and starve experts; widen for fp64."""
    fill_route_tables(model, {name: torch.arange(VOCAB) * (row + 1) for row, name in enumerate(NAMES)}, seed=3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer[list(case.starved)] = -10
    return model.double() if case.dtype == "float64" else model


def batch_of(case, number):
    """The global batch of a step: sequences of all domains, or of one a rank; some tokens without a label."""
    random = torch.Generator().manual_seed(100 * case.seed + number)
    token_BS = torch.randint(VOCAB, (SEQUENCES, LENGTH), generator=random)
    label_BS = token_BS.roll(-1, 1)
    label_BS[torch.rand(token_BS.shape, generator=random) < 0.2] = IGNORED
    label_BS[: SEQUENCES // 2 if case.padding else 2] = IGNORED  # of four ranks one has nothing but padding as it is
    domain_B = torch.tensor([0, 1, 2, 1, 0, 0, 2, 1])
    return Batch(
        token_BS=token_BS,
        label_BS=label_BS,
        start_BS=torch.tensor([0, 0, 0, 3, 3, 3, 3]).repeat(SEQUENCES, 1),
        domain_B=torch.arange(SEQUENCES) * len(NAMES) // SEQUENCES if case.absent else domain_B,
        sample_B=torch.arange(SEQUENCES) + 40 + number * SEQUENCES,
    )


def train_step(case, model, engine, micros, labels, tokens, number, *, poisoned=False, pause=lambda: None):
    """One optimizer step over the micro-batches; return this process's part of the loss, and the result.

    `pause` is called where this process goes on to something that all do together.
    """
    training = TrainingPass(seed=1, step=number, fractions=fractions(case.config, model.registry))
    engine.train_only(case.trains(number))
    total = 0.0
    for micro in micros:
        pause()
        loss, _ = objective(model, micro, training, labels, tokens)
        if poisoned:
            loss = loss * float("inf")
        pause()
        engine.backward(loss)
        total += float(loss.detach())
    pause()
    return total, engine.step(1e-3 / (number + 1))


def gathered(results, kind):
    """Put tensors together from the pieces of all ranks, `(answer, tensors)` each; every element is held once."""
    whole, seen = {}, {}
    for answer, tensors in results:
        for number, (name, shape, dim, first, stop, begin, end) in enumerate(answer["places"][kind]):
            piece = tensors[f"{kind}.{number}"]
            if name not in whole:
                whole[name] = torch.zeros(shape, dtype=piece.dtype)
                seen[name] = torch.zeros(shape, dtype=torch.int32)
            for tensor, value in ((whole[name], piece), (seen[name], 1)):
                box = tensor if dim is None else tensor.narrow(dim, first, stop - first)
                flat = box.flatten()
                flat[begin:end] = flat[begin:end] + value
                box.copy_(flat.view_as(box))
    assert [name for name, count in seen.items() if not bool((count == 1).all())] == []
    return whole


def labels_of(whole):
    return int((whole.label_BS != IGNORED).sum())


def reloads(world):
    """Pairs of cases: what the first saved, the second loads and goes on with."""
    cases = zero_cases(world)
    plain = [case for case in cases if case.key == cases[0].key]
    others = [case for case in cases if case.dtype == "bfloat16" or case.tp * case.ep > 1][:4]
    return [*((plain[0], case) for case in plain), (plain[-1], plain[0]), *((case, case) for case in others)]


def zero_cases(world):
    """All cases of a world size."""
    replace = dataclasses.replace
    if world == 2:
        base = ZeroCase(world=2, router=GLOBAL)
        return [
            base,
            replace(base, stage=2),
            replace(base, stage=2, micro=1, router=DOMAIN, seed=0, changes=(("tie_embeddings", True),)),
            replace(base, stage=1, micro=2, clip=0.05),
            replace(base, tp=2, stage=2, router=BIAS, seed=0, starved=(0,), changes=(("qk_norm", "width"),)),
            replace(base, ep=2, stage=1, router=BIAS, seed=0, starved=(0,), micro=1),
            replace(base, ep=2, stage=2, router=DOMAIN, seed=0),
            replace(base, tp=2, ep=2, etp=1, stage=1, router=DOMAIN, seed=0, clip=None),
            replace(base, ep=2, stage=2, router=GLOBAL, outside=True, micro=1),
            replace(base, router=GLOBAL, outside=True),
            replace(base, stage=2, dtype="bfloat16", micro=1),
            replace(base, stage=1, dtype="bfloat16", ep=2, micro=1),
            replace(base, stage=1, dtype="bfloat16", outside=True, offload="cpu"),
            replace(base, stage=1, offload="cpu", micro=2),
            replace(base, stage=2, offload="cpu", micro=2),
            replace(base, stage=2, ep=2, router=DOMAIN, seed=0, frozen=(None, 3, 3)),
            replace(base, stage=2, poison=1),
            replace(base, ep=2, stage=2, dtype="float64", micro=1),
            replace(base, stage=1, offload="cpu", dtype="float64", outside=True),
            replace(base, stage=1, ep=2, poison=0, micro=2),
            replace(base, stage=2, router=TABLE, changes=SLOTS, absent=True, micro=4),
            replace(base, stage=1, router=TABLE, changes=SLOTS, absent=True, micro=2),
            replace(base, ep=2, stage=2, router=PAIR, starved=(0, 2, 4)),  # all that rank 0 has
            replace(base, ep=2, stage=1, padding=True),
            replace(base, ep=2, stage=2, slow=1, micro=1),
            replace(base, tp=2, etp=1, stage=2, slow=0, router=DOMAIN, seed=0, recompute="layer"),
            replace(base, tp=2, stage=1, router=LIMITED, recompute="layer", changes=(("qk_norm", "head"),)),
            replace(base, ep=2, stage=1, router=LIMITED, seed=0, recompute="experts", micro=4),
        ]
    base = ZeroCase(world=4, router=GLOBAL)
    return [
        base,
        replace(base, stage=2, router=DOMAIN, seed=0, micro=1),
        replace(base, tp=2, ep=2, stage=1, router=DOMAIN, seed=0, clip=0.05),
        replace(base, tp=2, ep=2, etp=1, stage=2, router=LIMITED, seed=0, recompute="layer"),
        replace(base, tp=2, ep=4, etp=1, stage=1, router=GLOBAL),
        replace(base, tp=2, stage=2, router=TABLE, dtype="bfloat16", micro=2, changes=SLOTS),
        replace(base, ep=2, stage=2, router=GLOBAL, micro=2, offload="cpu"),
        replace(base, ep=2, stage=1, router=GLOBAL, outside=True),
        replace(base, ep=4, stage=2, router=DOMAIN, seed=0, poison=2),
        replace(base, tp=2, ep=2, etp=1, stage=2, router=DOMAIN, seed=0, dtype="float64", recompute="layer"),
        replace(base, stage=2, router=TABLE, changes=SLOTS, absent=True),
        replace(
            base, tp=2, ep=2, stage=2, router=BIAS, seed=10, recompute="attention", changes=(("qk_norm", "width"),)
        ),
    ]

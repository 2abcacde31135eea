"""Layouts that train a few steps under ZeRO, and the same steps in one process. Used on both sides."""

import dataclasses

import torch

from sigmoe.moe.batch import IGNORED, Batch
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.initialize import draw
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
    dtype: str = "float32"
    outside: bool = False
    clip: float | None = 1.0
    frozen: tuple[int | None, ...] = (None,) * STEPS  # by step, the only expert that trains; None: everything
    poison: int | None = None  # the rank that has no finite loss in step 1
    absent: bool = False  # ranks see one domain each

    @property
    def name(self):
        layout = f"dp{self.world // self.tp}tp{self.tp}ep{self.ep}etp{self.etp or self.tp}-zero{self.stage}"
        words = [layout, self.router.name, f"micro{self.micro}", self.dtype, f"clip{self.clip}"]
        words += ["offload"] * (self.offload == "cpu") + ["outside"] * self.outside + ["absent"] * self.absent
        words += ["frozen"] * any(self.frozen) + ["poison"] * (self.poison is not None)
        return "-".join([*words, *(f"{key}={value}" for key, value in self.changes)])

    @property
    def key(self):
        """What the single process depends on."""
        alike = dataclasses.replace(self, world=1, tp=1, ep=1, etp=None, micro=2, stage=1, offload="none")
        return repr(dataclasses.replace(alike, outside=False, poison=None if self.poison is None else 0))

    @property
    def config(self):
        shape = {"vocab_size": VOCAB, "dim": 18, "num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "head_dim": 4}
        shape |= {"expert_dim": 12, "ffn_dim": 8, "sparse_layers": "upper:2", "init_std": 0.1}
        return ModelConfig(**{**shape, "router": self.router, **dict(self.changes)})

    @property
    def parallel(self):
        return ParallelConfig(tp=self.tp, ep=self.ep, etp=self.etp, zero_stage=self.stage, offload=self.offload)

    @property
    def optim(self):
        return OptimizerConfig(lr=1e-3, clip_norm=self.clip)

    def trains(self, number):
        """Which parameters train in a step."""
        expert = self.frozen[min(number, STEPS - 1)]
        return lambda name: expert is None or f".experts.{expert}." in name or name.endswith("norm.weight")


def start(model):
    """Route tables; and nobody chooses expert 0 where a selection bias can say so."""
    fill_route_tables(model, {name: torch.arange(VOCAB) * (row + 1) for row, name in enumerate(NAMES)}, seed=3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer[0] = -10
    return model


def batch_of(case, number):
    """The global batch of a step: sequences of all domains, or of one a rank; some tokens without a label."""
    random = torch.Generator().manual_seed(100 * case.seed + number)
    token_BS = torch.randint(VOCAB, (SEQUENCES, LENGTH), generator=random)
    label_BS = token_BS.roll(-1, 1)
    label_BS[torch.rand(token_BS.shape, generator=random) < 0.2] = IGNORED
    label_BS[:2] = IGNORED  # a rank may have nothing but padding
    domain_B = torch.tensor([0, 1, 2, 1, 0, 0, 2, 1])
    return Batch(
        token_BS=token_BS,
        label_BS=label_BS,
        start_BS=torch.tensor([0, 0, 0, 3, 3, 3, 3]).repeat(SEQUENCES, 1),
        domain_B=torch.arange(SEQUENCES) * len(NAMES) // SEQUENCES if case.absent else domain_B,
        sample_B=torch.arange(SEQUENCES) + 40 + number * SEQUENCES,
    )


def fractions(config, registry):
    """The previous step's load of every sparse layer, made up."""
    shares = {}
    for index, layer in enumerate(config.sparse_layer_ids):
        groups = 1 if config.router.name == "top_k" else len(NAMES)
        size = 1 + max(expert for experts in registry.sets(index) for expert in experts)
        shares[layer] = draw(f"fractions{layer}", (groups, size), 1.0, 2).abs()
        shares[layer] /= shares[layer].sum(1, keepdim=True)
    return shares


def train_step(case, model, engine, micros, labels, tokens, number, *, poisoned=False):
    """One optimizer step over the micro-batches; return this process's part of the loss, and the result."""
    config = case.config
    training = TrainingPass(seed=1, step=number, fractions=fractions(config, model.registry))
    engine.train_only(case.trains(number))
    total = 0.0
    for micro in micros:
        output = model(
            micro.token_BS,
            start_BS=micro.start_BS,
            domain_B=micro.domain_B,
            sample_B=micro.sample_B,
            label_BS=micro.label_BS,
            training=training,
        )
        balance = torch.stack([stats.balance_sum for stats in output.stats]).sum()
        z = torch.stack([stats.z_sum for stats in output.stats]).sum()
        share = 1 / (len(output.stats) * tokens)
        loss = output.loss_sum / labels + share * (config.router.auxiliary_loss * balance + config.router.z_loss * z)
        if poisoned:
            loss = loss * float("inf")
        engine.backward(loss)
        total += float(loss.detach())
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
            replace(base, tp=2, stage=2, router=BIAS, seed=0, changes=(("qk_norm", "width"),)),
            replace(base, ep=2, stage=1, router=BIAS, seed=0, micro=1),
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
            replace(base, stage=1, ep=2, poison=0, micro=2),
            replace(base, stage=2, router=TABLE, changes=SLOTS, absent=True, micro=4),
            replace(base, stage=1, router=TABLE, changes=SLOTS, absent=True, micro=2),
        ]
    base = ZeroCase(world=4, router=GLOBAL)
    return [
        base,
        replace(base, stage=2, router=DOMAIN, seed=0, micro=1),
        replace(base, tp=2, ep=2, stage=1, router=DOMAIN, seed=0, clip=0.05),
        replace(base, tp=2, ep=2, etp=1, stage=2, router=GLOBAL),
        replace(base, tp=2, ep=4, etp=1, stage=1, router=GLOBAL),
        replace(base, tp=2, stage=2, router=TABLE, dtype="bfloat16", micro=2),
        replace(base, ep=2, stage=2, router=GLOBAL, micro=2, offload="cpu"),
        replace(base, ep=2, stage=1, router=GLOBAL, outside=True),
        replace(base, ep=4, stage=2, router=DOMAIN, seed=0, poison=2),
        replace(base, stage=2, router=TABLE, changes=SLOTS, absent=True),
    ]

"""Train the model that is shipped with sageLLM: tokenizer, training, evaluation and export.

Usage::

    python tools/train_builtin_model.py --work build/builtin --hours 1.6
    python tools/train_builtin_model.py --work build/builtin --hours 1.6 --resume
    python tools/train_builtin_model.py --work build/builtin --stage export

It needs torch, tokenizers, safetensors, PyYAML and, to evaluate, transformers. The texts are looked for in
``$SAGELLM_SHARED`` or in ``../shared`` beside the repository. The length of a run is given in hours, because one
core is all it takes: the learning rate and the mixture of texts follow the share of the time that has passed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from builtin_corpus import Batch, Corpus, Mixture, train_tokenizer
from builtin_export import evaluate, export_model, validation_loss, write_model_card
from builtin_llama import LlamaConfig, LlamaModel, document_mask
from builtin_optim import Muon
from builtin_questions import load_facts
from builtin_stories import load_stories, validation_stories

REPOSITORY = Path(__file__).resolve().parent.parent
OUTPUT = REPOSITORY / "src" / "sagellm_core" / "models" / "builtin"
FIRST = Mixture(stories=0.54, story_chat=0.16, tiny_talks=0.015)
LAST = Mixture(stories=0.42, story_chat=0.20, tiny_talks=0.0)
BLEND = 0.6
"""Share of the last weights where they are averaged with those of an earlier export."""
LONG_EVERY = 10
"""Every tenth batch has rows as long as the context, for long conversations."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that shapes a run."""

    hours: float
    seed: int = 20261121
    rows: int = 10
    length: int = 320
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    weight_decay: float = 0.02
    warmup_steps: int = 40
    decay_share: float = 0.45
    average: float = 0.985


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """One run: model, optimisers, averaged weights and the log."""

    def __init__(self, config: LlamaConfig, settings: Settings, corpus: Corpus, work: Path) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.corpus, self.work = settings, corpus, work
        self.model = LlamaModel(config)
        self.average = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.muon = Muon(matrices, settings.muon_lr, momentum=0.95, weight_decay=settings.weight_decay)
        self.adam = torch.optim.AdamW(others, settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.progress = Progress()
        self.losses: list[dict[str, float]] = []

    def share(self) -> float:
        """The share of the run that is over, from 0 to 1."""
        return min(1.0, self.progress.seconds / (self.settings.hours * 3600))

    def learning_rate(self) -> float:
        """Factor of the learning rates: warm-up, constant, then linearly down to nearly nothing."""
        warm = min(1.0, (self.progress.step + 1) / self.settings.warmup_steps)
        left = (1.0 - self.share()) / self.settings.decay_share
        return warm * min(1.0, max(left, 0.01))

    def mixture(self) -> Mixture:
        """More questions and answers in the second half of the run."""
        late = min(1.0, max(0.0, (self.share() - 0.4) / 0.3))
        first, last = asdict(FIRST), asdict(LAST)
        return Mixture(**{name: first[name] + (last[name] - first[name]) * late for name in first})

    def _batch(self) -> Batch:
        """The next rows, of the usual or now and then of the full length."""
        rows, length = self.settings.rows, self.settings.length
        if self.progress.step % LONG_EVERY == LONG_EVERY - 1:
            full = self.model.config.max_position_embeddings
            rows, length = max(1, rows * length // full), full
        return self.corpus.batch(self.mixture(), rows, length)

    def step(self, forward: Callable[[Tensor, Tensor], Tensor]) -> float:
        """One update; the loss before it."""
        batch = self._batch()
        factor = self.learning_rate()
        for optimizer, rate in ((self.muon, self.settings.muon_lr), (self.adam, self.settings.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        hidden = forward(batch.tokens, document_mask(batch.documents))
        loss = self.model.loss(hidden, batch.targets, batch.weights)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.muon.step()
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        keep = min(self.settings.average, 1 - 1 / (self.progress.step + 1))
        for name, tensor in self.model.state_dict().items():
            self.average[name].lerp_(tensor, 1 - keep)
        self.progress.step += 1
        self.progress.tokens += int((batch.documents >= 0).sum())
        return float(loss)

    def run(self, forward: Callable[[Tensor, Tensor], Tensor], export_minutes: float) -> None:
        """Train until the time is over, saving on the way."""
        recent: list[float] = []
        clock = last_export = time.monotonic()
        while self.share() < 1.0:
            recent.append(self.step(forward))
            now = time.monotonic()
            self.progress.seconds += now - clock
            clock = now
            if self.progress.step % 50 == 0:
                self._report(sum(recent) / len(recent))
                recent.clear()
            if now - last_export > export_minutes * 60:
                self.save()
                last_export = now
                clock = time.monotonic()
        self.save()

    def _report(self, loss: float) -> None:
        """A line on the screen and a row of the loss curve."""
        progress = self.progress
        row = {"step": progress.step, "tokens": progress.tokens, "minutes": round(progress.seconds / 60, 1),
               "loss": round(loss, 4), "lr": round(self.learning_rate(), 3)}  # fmt: skip
        self.losses.append(row)
        print(json.dumps(row), flush=True)

    def save(self) -> None:
        """A checkpoint to resume from."""
        state = {
            "config": self.model.config.to_dict(), "settings": asdict(self.settings), "progress": asdict(self.progress),
            "model": self.model.state_dict(), "average": self.average, "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(), "random": self.corpus.rng.getstate(), "losses": self.losses,
        }  # fmt: skip
        torch.save(state, self.work / "checkpoint.tmp")
        (self.work / "checkpoint.tmp").replace(self.work / "checkpoint.pt")

    def load(self) -> None:
        """Go on from the last checkpoint; the time given is the whole run's."""
        state = load_checkpoint(self.work)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.progress = Progress(**state["progress"])
        self.corpus.rng.setstate(state["random"])
        self.losses = state["losses"]


def load_checkpoint(work: Path) -> dict[str, Any]:
    """The last checkpoint of a working folder (written by this script)."""
    state: dict[str, Any] = torch.load(work / "checkpoint.pt", weights_only=False)
    return state


def run_tokenizer(texts: Path, work: Path, size: int) -> None:
    """Stage one: the vocabulary."""
    train_tokenizer(load_facts(), load_stories(texts / "tinystories"), size).save(str(work / "tokenizer.json"))


def run_training(arguments: argparse.Namespace, texts: Path) -> None:
    """Stage two: the weights."""
    settings = Settings(hours=arguments.hours, seed=arguments.seed)
    random.seed(settings.seed)
    tokenizer = Tokenizer.from_file(str(arguments.work / "tokenizer.json"))
    corpus = Corpus(texts, tokenizer, settings.seed)
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=arguments.layers)
    trainer = Trainer(config, settings, corpus, arguments.work)
    if arguments.resume:
        trainer.load()
    print(sum(p.numel() for p in trainer.model.parameters()), "parameters", len(corpus.stories), "stories", flush=True)
    forward: Callable[[Tensor, Tensor], Tensor] = trainer.model
    if arguments.compile:
        forward = torch.compile(trainer.model, dynamic=False)
    trainer.run(forward, arguments.save_minutes)


def run_export(arguments: argparse.Namespace, texts: Path) -> None:
    """Stages three and four: write the model, measure it as it is shipped, write the card."""
    state = load_checkpoint(arguments.work)
    config = LlamaConfig(**state["config"])
    weights: dict[str, Tensor] = state["average"]
    if arguments.blend is not None:
        earlier = load_file(arguments.blend / "model.safetensors")
        weights = {name: earlier[name].float().lerp(tensor, BLEND) for name, tensor in weights.items()}
    export_model(config, weights, arguments.work / "tokenizer.json", arguments.out)
    results = evaluate(arguments.out)
    results |= validation_loss(arguments.out, validation_stories(texts / "tinystories"))
    (arguments.work / "results.json").write_text(json.dumps(results, ensure_ascii=False, indent=1), encoding="utf-8")
    write_model_card(config, state, results, arguments.note, arguments.out)
    print(json.dumps({k: v for k, v in results.items() if not isinstance(v, list)}))


def main() -> None:
    """Parse the arguments and run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the tokenizer and checkpoints")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder of the exported model")
    parser.add_argument("--stage", choices=("all", "tokenizer", "train", "export"), default="all")
    parser.add_argument("--hours", type=float, default=1.6)
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--blend", type=Path, help="an earlier export of the run to average the weights with")
    parser.add_argument("--note", default="", help="a sentence about the run for the model card")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    texts = Path(os.environ.get("SAGELLM_SHARED", REPOSITORY.parent / "shared")) / "texts"
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.stage in {"all", "tokenizer"} and not arguments.resume:
        run_tokenizer(texts, arguments.work, arguments.vocabulary)
    if arguments.stage in {"all", "train"}:
        run_training(arguments, texts)
    if arguments.stage in {"all", "export"}:
        run_export(arguments, texts)


if __name__ == "__main__":
    main()

"""Train the bundled demo: a small Llama-architecture GQA chat model that tells stories.

    python demo/train.py --out demo/stories --minutes 60 \\
        --stories stories.txt --prose book.txt --chat conversations.json

Training is bounded by wall-clock time, so the same command gives a usable model on two CPU cores or on a GPU; the
learning rate follows the fraction of that time. Stop it at any moment and run the same command again: it goes on
from the last saved state. Hidden matrices train with Muon, the rest with AdamW. The result is an ordinary Hugging Face
folder.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpus import Conversation, Prompter, Turn, is_held_out, read_conversations, read_prose, read_stories, unique
from llama import Config, Llama
from muon import Muon
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

PAD, BOS, END = "<pad>", "<s>", "<|end|>"
SPECIAL = (PAD, BOS, END, "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' ~ message.role) }}{% endif %}"
    "{{ '<|' ~ message.role ~ '|>\\n' ~ message.content ~ '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SAVE_SECONDS = 300


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Corpus:
    """Documents as token ids. A story is seen as plain text or, every other time, as the answer to a request for it."""

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        stories = unique(s for path in args.stories for s in read_stories(path))
        self.held_out = [s for s in stories if is_held_out(s)]
        self.stories = [s for s in stories if not is_held_out(s)]
        self.prose = unique(d for path in args.prose for d in read_prose(path))
        self.chats: list[Conversation] = [c for path in args.chat for c in read_conversations(path)]
        self.tokenizer = tokenizer or train_tokenizer(self.stories + self.prose[::8], vocab_size)
        self._prompter = Prompter(self.stories)
        self._story_share = args.story_share
        self._deck: list[str] = []

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def chat(self, turns: Conversation) -> list[int]:
        return self.encode(BOS + "".join(f"<|{t.role}|>\n{t.content}{END}\n" for t in turns))

    def draw(self, rng: random.Random) -> list[int]:
        """One document; every story comes up once before any comes up again."""
        if rng.random() > self._story_share and (self.prose or self.chats):
            if self.chats and rng.random() < 0.2:
                return self.chat(rng.choice(self.chats))
            return self.encode(BOS + rng.choice(self.prose))[:1024]
        if not self._deck:
            self._deck = rng.sample(self.stories, len(self.stories))
        story = self._deck.pop()
        if rng.random() < 0.5:
            return self.chat((Turn("user", self._prompter.request(story, rng)), Turn("assistant", story)))
        return self.encode(BOS + story + END)

    def batches(self, tokens: int, lengths: tuple[int, ...], rng: random.Random) -> Iterator[Tensor]:
        """Endless int64 [tokens / S, S + 1] batches, S drawn from `lengths`; documents are laid end to end."""
        stream: list[int] = []
        while True:
            length = rng.choice(lengths)
            need = tokens // length * (length + 1)
            while len(stream) < need:
                stream += self.draw(rng)
            yield torch.tensor(stream[:need]).view(-1, length + 1)
            del stream[:need]


@torch.no_grad()
def bits_per_byte(model: Llama, corpus: Corpus, stories: list[str]) -> float:
    """Plain stories, each alone after <s>, at most the model's context; the end token is not counted."""
    model.eval()
    nats, size = 0.0, 0
    for story in stories:
        ids = torch.tensor(corpus.encode(BOS + story)[: model.cos.shape[0]], device=model.cos.device)
        nats += F.cross_entropy(model(ids[None, :-1])[0].float(), ids[1:], reduction="sum").item()
        size += len(corpus.tokenizer.decode(ids[1:].tolist()).encode())
    model.train()
    return nats / math.log(2) / max(1, size)


@torch.no_grad()
def sample(model: Llama, corpus: Corpus, request: str, tokens: int = 200) -> str:
    model.eval()
    device = model.cos.device
    ids = corpus.encode(f"{BOS}<|user|>\n{request}{END}\n<|assistant|>\n")
    start, end = len(ids), corpus.tokenizer.token_to_id(END)
    generator = torch.Generator(device).manual_seed(0)
    while len(ids) < start + tokens and ids[-1] != end:
        probs = (model(torch.tensor([ids], device=device))[0, -1].float() / 0.7).softmax(-1)
        ids.append(int(torch.multinomial(probs, 1, generator=generator)))
    model.train()
    return corpus.tokenizer.decode(ids[start:])


def save_checkpoint(model: Llama, corpus: Corpus, c: Config, out: Path) -> None:
    """The Hugging Face folder: bf16 weights, config, tokenizer, chat template."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{n}": p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    special = {
        f"{name}_token_id": corpus.tokenizer.token_to_id(t) for name, t in (("bos", BOS), ("eos", END), ("pad", PAD))
    }
    architecture = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    files = {
        "config.json": architecture | asdict(c) | special,
        "generation_config.json": special | {"do_sample": True, "temperature": 0.7, "top_p": 0.95},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": END, "pad_token": PAD,
            "clean_up_tokenization_spaces": False, "model_max_length": c.max_position_embeddings,
            "chat_template": CHAT_TEMPLATE,
        },
    }  # fmt: skip
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    corpus.tokenizer.save(str(out / "tokenizer.json"))


class Trainer:
    """Model, optimizers and how far they are; `state` and `load` carry all of it from one run to the next."""

    def __init__(self, c: Config, dropout: float, lr: float, device: str) -> None:
        self.model = Llama(c, dropout).to(device)
        matrices = [p for p in self.model.layers.parameters() if p.dim() == 2]
        others = [p for n, p in self.model.named_parameters() if p.dim() == 1 or n.startswith("embed")]
        adam = torch.optim.AdamW(others, lr=0.15 * lr, betas=(0.9, 0.98), weight_decay=0.0)
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [(Muon(matrices, lr), lr), (adam, 0.15 * lr)]
        self.steps, self.tokens, self.seconds = 0, 0, 0.0
        self.loss = math.nan  # nats per token, a running mean

    def step(self, ids: Tensor, lr_factor: float) -> None:
        """One optimizer step on ids int64 [B, S + 1]."""
        logits = self.model(ids[:, :-1]).flatten(0, 1).float()
        loss = F.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, lr in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens += ids[:, 1:].numel()
        self.loss = loss.item() if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss.item()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(), "optimizers": [o.state_dict() for o, _ in self._optimizers],
            "step": self.steps, "seen": self.tokens, "seconds": self.seconds,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps, self.tokens, self.seconds = state["step"], state["seen"], state["seconds"]


def lr_schedule(done: float) -> float:
    """Learning-rate factor at a fraction of the training time: warm up, hold, then down to 2 % over the last half."""
    return min(1.0, done / 0.01 + 0.01) if done < 0.5 else max(0.02, 2 * (1 - done))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the checkpoint; its training state lies beside it")
    add("--stories", type=Path, nargs="+", required=True, help="story files; 3 %% of the stories are held out")
    add("--prose", type=Path, nargs="*", default=[], help="other plain text")
    add("--chat", type=Path, nargs="*", default=[], help="ShareGPT .json or Alpaca .jsonl conversations")
    add("--story-share", type=float, default=0.9, help="share of documents that are stories (default 0.9)")
    add("--minutes", type=float, default=60, help="training time, over all runs together (default 60)")
    add("--batch-tokens", type=int, default=6144, help="tokens per step, at least 1024 (default 6144)")
    add("--dropout", type=float, default=0.05)
    add("--lr", type=float, default=0.02, help="Muon's; AdamW takes 0.15 of it (default 0.02)")
    add("--threads", type=int, default=0, help="CPU threads (default: all)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    for path in [*args.stories, *args.prose, *args.chat]:
        if not path.is_file():
            parser.error(f"no such file: {path}")
    if args.batch_tokens < 1024:
        parser.error("--batch-tokens must be at least 1024, the longest sequence")
    return args


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    config = Config()
    trainer = Trainer(config, args.dropout, args.lr, device)
    state_file = args.out.with_name(args.out.name + ".state.pt")
    state = torch.load(state_file, map_location=device, weights_only=True) if state_file.exists() else None
    if state:
        trainer.load(state)
    corpus = Corpus(args, Tokenizer.from_str(state["tokenizer"]) if state else None, config.vocab_size)
    print(
        f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.2f} M parameters; {len(corpus.stories)} stories, "
        f"{len(corpus.held_out)} held out; {len(corpus.prose)} prose documents, {len(corpus.chats)} conversations",
        flush=True,
    )
    batches = corpus.batches(args.batch_tokens, (512, 512, 1024), random.Random(args.seed + trainer.steps))
    total, saved_at = 60 * args.minutes, trainer.seconds
    with tqdm(total=round(total), initial=round(trainer.seconds), unit="s", mininterval=10) as bar:
        while trainer.seconds < total:
            start = time.monotonic()
            trainer.step(next(batches).to(device), lr_schedule(trainer.seconds / total))
            spent = time.monotonic() - start
            trainer.seconds += spent
            bar.set_postfix_str(f"step {trainer.steps}, loss {trainer.loss:.3f}", refresh=False)
            bar.update(round(trainer.seconds) - bar.n)
            if trainer.seconds - saved_at > SAVE_SECONDS or trainer.seconds >= total:
                saved_at = trainer.seconds
                save_checkpoint(trainer.model, corpus, config, args.out)
                torch.save(trainer.state() | {"tokenizer": corpus.tokenizer.to_str()}, state_file)
                bpb = bits_per_byte(trainer.model, corpus, corpus.held_out)
                bar.write(
                    f"{trainer.seconds / 60:.1f} min, {trainer.tokens / 1e6:.1f} M tokens: held out {bpb:.4f} bits per "
                    f"byte, training loss {trainer.loss:.3f}\n    "
                    + sample(trainer.model, corpus, "Tell me a story about a cat and a boat.").replace("\n", " ")
                )


if __name__ == "__main__":
    main()

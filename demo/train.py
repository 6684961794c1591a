"""Train the bundled demo: a small Llama-architecture GQA chat model that tells stories.

    python demo/train.py --out demo/stories --minutes 60 \\
        --stories stories.txt --prose book.txt --chat conversations.json

Training is bounded by wall-clock time, so the same command gives a usable model on two CPU cores or on a GPU; the
learning rate follows the fraction of that time. Stop it at any moment and run the same command again: it goes on
from the last saved state. Hidden matrices train with Muon (https://kellerjordan.github.io/posts/muon), the rest with
AdamW. The result is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import Conversation, Prompter, Turn, is_held_out, read_conversations, read_prose, read_stories, unique
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

BOS, END, USER, ASSISTANT, SYSTEM = "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL = ("<pad>", BOS, END, USER, ASSISTANT, SYSTEM)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' ~ message.role) }}{% endif %}"
    "{{ '<|' ~ message.role ~ '|>\\n' ~ message.content ~ '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Config:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, S, hidden]; cos, sin [S, D/2]
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.c.head_dim)).transpose(1, 2)  # [B, heads, S, D]

        def rotate(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        q, k, v = rotate(heads(self.q_proj(x))), rotate(heads(self.k_proj(x))), heads(self.v_proj(x))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(o.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: Config, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    """Parameter names are those of a Hugging Face `LlamaModel`; the head is the embedding (tied)."""

    def __init__(self, c: Config, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, dropout) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        inv_freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        angle = torch.arange(c.max_position_embeddings)[:, None] * inv_freq
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = (
                    1 / math.sqrt(2 * c.num_hidden_layers)
                    if name.endswith(("o_proj.weight", "down_proj.weight"))
                    else 1
                )
                nn.init.normal_(p, std=0.02 * scale)

    def forward(self, ids: Tensor) -> Tensor:  # int64 [B, S] -> logits [B, S, vocab]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        return F.linear(self.norm(x), self.embed_tokens.weight)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is the nearest semi-orthogonal matrix, by five Newton-Schulz steps."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(m, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))


def orthogonalise(g: Tensor) -> Tensor:
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


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

    def batches(self, tokens: int, lengths: tuple[int, ...], rng: random.Random):  # type: ignore[no-untyped-def]
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
def bits_per_byte(model: Llama, corpus: Corpus, stories: list[str], device: str) -> float:
    """Plain stories, each alone after <s>, at most the model's context; the end token is not counted."""
    model.eval()
    nats, size = 0.0, 0
    for story in stories:
        ids = torch.tensor(corpus.encode(BOS + story)[: model.cos.shape[0]], device=device)
        nats += F.cross_entropy(model(ids[None, :-1])[0].float(), ids[1:], reduction="sum").item()
        size += len(corpus.tokenizer.decode(ids[1:].tolist()).encode())
    model.train()
    return nats / math.log(2) / size


@torch.no_grad()
def sample(model: Llama, corpus: Corpus, request: str, device: str, tokens: int = 200) -> str:
    model.eval()
    ids = corpus.encode(f"{BOS}{USER}\n{request}{END}\n{ASSISTANT}\n")
    start, end = len(ids), corpus.tokenizer.token_to_id(END)
    generator = torch.Generator(device).manual_seed(0)
    while len(ids) < start + tokens and ids[-1] != end:
        probs = (model(torch.tensor([ids], device=device))[0, -1].float() / 0.7).softmax(-1)
        ids.append(int(torch.multinomial(probs, 1, generator=generator)))
    model.train()
    return corpus.tokenizer.decode(ids[start:])


def schedule(done: float) -> float:
    """Learning-rate factor at a fraction of the training time: warm up, hold, then down to 2 % over the last half."""
    return min(1.0, done / 0.01 + 0.01) if done < 0.5 else max(0.02, 2 * (1 - done))


def save(model: Llama, corpus: Corpus, c: Config, out: Path) -> None:
    """The Hugging Face folder: bf16 weights, config, tokenizer, chat template."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{n}": p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    ids = {name: corpus.tokenizer.token_to_id(token) for name, token in (("bos", BOS), ("eos", END), ("pad", "<pad>"))}
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
             "mlp_bias": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}  # fmt: skip
    special = {f"{name}_token_id": i for name, i in ids.items()}
    write = {
        "config.json": fixed | asdict(c) | special,
        "generation_config.json": special | {"do_sample": True, "temperature": 0.7, "top_p": 0.95},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": END, "pad_token": "<pad>",
            "clean_up_tokenization_spaces": False, "model_max_length": c.max_position_embeddings,
            "chat_template": CHAT_TEMPLATE,
        },
    }  # fmt: skip
    for name, content in write.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    corpus.tokenizer.save(str(out / "tokenizer.json"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the checkpoint; its training state lies beside it"
    )
    parser.add_argument(
        "--stories", type=Path, nargs="+", required=True, help="story files; 3 %% of the stories are held out"
    )
    parser.add_argument("--prose", type=Path, nargs="*", default=[], help="other plain text")
    parser.add_argument(
        "--chat", type=Path, nargs="*", default=[], help="ShareGPT .json or Alpaca .jsonl conversations"
    )
    parser.add_argument(
        "--story-share", type=float, default=0.9, help="share of documents that are stories (default 0.9)"
    )
    parser.add_argument("--minutes", type=float, default=60, help="training time, over all runs together (default 60)")
    parser.add_argument("--batch-tokens", type=int, default=6144, help="tokens per step (default 6144)")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's; AdamW takes 0.15 of it")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for path in [*args.stories, *args.prose, *args.chat]:
        if not path.is_file():
            parser.error(f"no such file: {path}")
    return args


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    c = Config()
    state_file = args.out.with_name(args.out.name + ".state.pt")
    state = torch.load(state_file, map_location=device, weights_only=True) if state_file.exists() else None
    corpus = Corpus(args, Tokenizer.from_str(state["tokenizer"]) if state else None, c.vocab_size)
    model = Llama(c, args.dropout).to(device)
    matrices = [p for n, p in model.layers.named_parameters() if p.dim() == 2]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or n.startswith("embed")]
    adam = torch.optim.AdamW(others, lr=0.15 * args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [(Muon(matrices, args.lr), args.lr), (adam, 0.15 * args.lr)]
    step, seconds, seen = 0, 0.0, 0
    if state:
        model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds, seen = state["step"], state["seconds"], state["seen"]
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; {len(corpus.stories)} stories, "
        f"{len(corpus.held_out)} held out; {len(corpus.prose)} prose documents, {len(corpus.chats)} conversations",
        flush=True,
    )
    batches = corpus.batches(args.batch_tokens, (512, 512, 1024), random.Random(args.seed + step))
    total, last_save = 60 * args.minutes, seconds
    bar = tqdm(total=round(total), initial=round(seconds), unit="s", mininterval=10)
    loss_mean = float("nan")
    while seconds < total:
        start = time.monotonic()
        ids = next(batches).to(device)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(seconds / total)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids[:, 1:].numel()
        loss_mean = loss.item() if math.isnan(loss_mean) else 0.95 * loss_mean + 0.05 * loss.item()
        spent = time.monotonic() - start
        seconds += spent
        bar.update(round(seconds) - bar.n)
        bar.set_postfix_str(f"step {step}, loss {loss_mean:.3f}, {ids.numel() / spent:.0f} tok/s", refresh=False)
        if seconds - last_save > 300 or seconds >= total:
            last_save = seconds
            save(model, corpus, c, args.out)
            torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o, _ in optimizers], "step": step,
                        "seconds": seconds, "seen": seen, "tokenizer": corpus.tokenizer.to_str()}, state_file)  # fmt: skip
            bpb = bits_per_byte(model, corpus, corpus.held_out, device)
            bar.write(
                f"{seconds / 60:.0f} min, {seen / 1e6:.1f} M tokens: held out {bpb:.4f} bits per byte, train {loss_mean:.3f}"
            )
            bar.write(
                "    " + sample(model, corpus, "Tell me a story about a cat and a boat.", device).replace("\n", " "),
                file=sys.stdout,
            )
            sys.stdout.flush()
    bar.close()


if __name__ == "__main__":
    main()

"""Families of architectures: how they name config fields and tensors, and what their tensors say about sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from loraline.merger.weights.header import TensorInfo

Shapes = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Family:
    """How a family of architectures names its config fields and tensors; layer names come after `layers`."""

    name: str
    layers: re.Pattern[str]
    embedding: tuple[str, ...]
    hidden: str
    layer_count: str
    heads: str
    kv_heads: str = ""
    intermediate: str = ""
    query: str = ""
    key: str = ""
    fused_query: str = ""
    up: tuple[str, ...] = ()
    """Weights of the first feed-forward layer; the first that exists counts."""
    fused_up: str = ""
    """Gate and up in one weight: twice the intermediate size."""
    head: str = "lm_head.weight"
    conv1d: bool = False
    """Weights are stored as (in, out)."""


LLAMA_LIKE = Family(
    "Llama-like",
    re.compile(r"^(?:model\.)?layers\.(\d+)\.(.+)$"),
    ("model.embed_tokens.weight", "embed_tokens.weight"),
    hidden="hidden_size",
    layer_count="num_hidden_layers",
    heads="num_attention_heads",
    kv_heads="num_key_value_heads",
    intermediate="intermediate_size",
    query="self_attn.q_proj.weight",
    key="self_attn.k_proj.weight",
    fused_query="self_attn.qkv_proj.weight",
    up=("mlp.up_proj.weight", "mlp.fc1.weight"),
    fused_up="mlp.gate_up_proj.weight",
)
GPT2_LIKE = Family(
    "GPT-2-like",
    re.compile(r"^(?:transformer\.)?h\.(\d+)\.(.+)$"),
    ("transformer.wte.weight", "wte.weight"),
    hidden="n_embd",
    layer_count="n_layer",
    heads="n_head",
    intermediate="n_inner",
    fused_query="attn.c_attn.weight",
    up=("mlp.c_fc.weight",),
    conv1d=True,
)
NEOX_LIKE = Family(
    "GPT-NeoX-like",
    re.compile(r"^(?:gpt_neox\.)?layers\.(\d+)\.(.+)$"),
    ("gpt_neox.embed_in.weight", "embed_in.weight"),
    hidden="hidden_size",
    layer_count="num_hidden_layers",
    heads="num_attention_heads",
    intermediate="intermediate_size",
    fused_query="attention.query_key_value.weight",
    up=("mlp.dense_h_to_4h.weight",),
    head="embed_out.weight",
)
OPT_LIKE = Family(
    "OPT-like",
    re.compile(r"^(?:model\.)?decoder\.layers\.(\d+)\.(.+)$"),
    ("model.decoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    hidden="word_embed_proj_dim",
    layer_count="num_hidden_layers",
    heads="num_attention_heads",
    intermediate="ffn_dim",
    query="self_attn.q_proj.weight",
    key="self_attn.k_proj.weight",
    up=("fc1.weight",),
)
FAMILIES = (LLAMA_LIKE, GPT2_LIKE, NEOX_LIKE, OPT_LIKE)


@dataclass(frozen=True)
class Layout:
    """What the tensors of a folder say, whatever the config says."""

    family: Family
    embedding: TensorInfo
    layers: dict[int, dict[str, TensorInfo]]
    head: TensorInfo | None

    @property
    def rows(self) -> int:
        """Rows of the embedding: greatest token id plus one."""
        return self.embedding.shape[0]

    @property
    def hidden(self) -> int:
        """Width of the embedding."""
        return self.embedding.shape[1]

    def size_of(self, name: str) -> int | None:
        """Return the output size of a weight of the first layer that has it."""
        for layer in self.layers.values():
            if name in layer:
                return layer[name].shape[1 if self.family.conv1d else 0]
        return None

    @property
    def intermediate(self) -> int | None:
        """Width of the dense feed-forward layers; None for a mixture of experts without any."""
        for name in self.family.up:
            size = self.size_of(name)
            if size is not None:
                return size
        fused = self.size_of(self.family.fused_up)
        return None if fused is None else fused // 2


def find_layout(tensors: Shapes) -> Layout | None:
    """Recognise a family by its tensor names; None for others, whose dimensions are then not checked."""
    for family in FAMILIES:
        embedding = next((tensors[name] for name in family.embedding if name in tensors), None)
        layers: dict[int, dict[str, TensorInfo]] = {}
        for name, tensor in tensors.items():
            match = family.layers.match(name)
            if match:
                layers.setdefault(int(match[1]), {})[match[2]] = tensor
        if embedding is not None and len(embedding.shape) == 2 and layers:
            return Layout(family, embedding, layers, tensors.get(family.head))
    return None

"""The engines: what computes. Only these modules import torch, transformers and peft."""

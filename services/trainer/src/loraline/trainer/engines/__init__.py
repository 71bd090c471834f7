"""The parts that import torch, transformers, peft and TRL; only a job's child process loads them."""

"""Recipes of training runs that several tests start from."""

from tests.harness.injection import RECIPE

EVERYTHING = """
domains:
  - {{name: code, data: [1], teacher: coder}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3, gamma: 2.0}}
train:
  {{experts: all, router: true, attention: true, norms: true, embedding: true, output_layer: true}}
"""


FEATURES = """
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {{layers: {{1: [1], 3: [0, 3]}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective:
  alpha: 0.7
  beta: 0.3
imitation: {{hidden: 0.5, experts: 0.25}}
"""


STEERED = """
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {{layers: {{1: [2], 2: [0, 3], 3: [3]}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3}}
train: {{router: true}}
steering: {{coeff: 0.5, target_mass: 0.8, balance: 0.1, retention: 1.0, detail_every: 2}}
"""


LITTLE = "train: {{{{experts: none, {}}}}}\n"
ROWS = RECIPE + LITTLE.format("router_rows: true")


TOLD = """
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {{layers: {{2: [3], 3: [0, 3]}}}}
teachers:
  coder: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3, temperature: 2.0}}
steering: {{coeff: 0.5, target_mass: 0.8, confidence: label}}
train: {{attention: true}}
"""
"""Steered by the label's probability, which stores and servers tell in a model's place."""
ALIGNED = """
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {{layers: {{2: [3], 3: [0, 3]}}}}
teachers:
  coder: {{source: "hf:{teacher}", align: chunks}}
objective: {{alpha: 0.7, beta: 0.3, temperature: 5.0}}
steering: {{coeff: 0.5, target_mass: 0.8, confidence: label}}
train: {{attention: true}}
"""
"""From a teacher with a tokenizer of its own."""

"""Core of the system: data, mathematics, objectives, algorithms, loops and run records.

Nothing in this package imports ray, vllm or deepspeed; the roles that do live in ``actors`` and their placement in
``cluster``.
"""

__version__ = "0.1.0"

"""Serving requests that come at any time: continuous batching on a manager's cache."""

from ferrum_jax.integrations.engine.completion import Completion, TakenToken
from ferrum_jax.integrations.engine.engine import Engine
from ferrum_jax.integrations.engine.options import EngineOptions, RequestOptions, StepShape

__all__ = ["Completion", "Engine", "EngineOptions", "RequestOptions", "StepShape", "TakenToken"]

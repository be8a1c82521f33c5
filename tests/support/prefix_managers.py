"""Managers that cache prefixes, and requests that compute and commit their prompts."""

import dataclasses
import math

from tests.support.managers import PREFIXES, Clock, make_manager, write_tokens

PROMPT = [11, 12, 13, 14, 15, 16, 17]  # Two full blocks of three, and a token.
CONFIG = dataclasses.replace(PREFIXES, max_prefixes=100, prefix_ttl_seconds=math.inf)


def make(num_blocks=12, **options):
    sizes = {"max_blocks": num_blocks, "initial_blocks": num_blocks, "clock": Clock()}
    caching = {"enable_prefix_caching": True, "prefix_cache_config": CONFIG}
    return make_manager(**sizes, **caching, **options)


def ask(manager, name, prompt=PROMPT, salt=None, **more):
    """Allocates a request with a prompt, without computing it."""
    request = manager.new_request(name, prompt_token_ids=prompt, cache_salt=salt, **more)
    return manager.allocate(request)


def compute(manager, name, prompt=PROMPT, salt=None, **more):
    """Allocates a request, and computes the tokens of its prompt that are not cached."""
    handle = ask(manager, name, prompt, salt, **more)
    skip = handle.num_cached_tokens
    write_tokens(manager, handle, prompt[skip:], begin=skip)
    return handle


def keep(manager, name, prompt=PROMPT, salt=None, **more):
    """Computes and commits a prompt."""
    handle = compute(manager, name, prompt, salt, **more)
    manager.commit(handle)
    return handle


def found(manager, prompt=PROMPT, salt=None) -> int:
    return manager.explain_lookup(prompt, salt).num_cached_tokens

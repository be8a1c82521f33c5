"""Model folders and GGUF files with random damage: cut short, or with changed fields or bytes."""

import json
import shutil

NOT_VALUES = [
    *(None, "text", 0, -1, 1.5, float("nan"), float("inf"), True, [], {}, "\ud800"),
    *(2**31, 10**30, 10**400, [["x"]], [1, 2]),
]
TEXTS = {
    "empty": "",
    "not JSON": "\x00 nonsense",
    "another type": "[1]",
    "nested deeply": "[" * 100_000,
    "digits": '{"a": ' + "9" * 5_000 + "}",
}


def damaged_json(text, rng):
    """JSON cut short, replaced, or with one field missing or of a wrong value."""
    kind = rng.choice(["cut", "text", *["field"] * 6, "missing"])
    if kind == "cut":
        return text[: rng.randrange(len(text))]
    if kind == "text":
        return rng.choice(list(TEXTS.values()))
    value = json.loads(text)
    path = rng.choice(list(_paths(value)))
    holder = value
    for step in path[:-1]:
        holder = holder[step]
    if kind == "missing":
        del holder[path[-1]]
    else:
        holder[path[-1]] = rng.choice(NOT_VALUES)
    return json.dumps(value)


def damaged_bytes(data, rng, num_header_bytes):
    """Bytes cut short, or changed within the header."""
    kind = rng.choice(["cut", "cut in header", *["changed"] * 4])
    if kind == "cut":
        return data[: rng.randrange(len(data))]
    if kind == "cut in header":
        return data[: rng.randrange(num_header_bytes)]
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(num_header_bytes)] = rng.choice([0, 1, 255, rng.randrange(256)])
    return bytes(changed)


def damage_folder(good, folder, rng):
    """Copies a model folder and damages one of its files."""
    shutil.copytree(good, folder)
    path = rng.choice(sorted(folder.iterdir()))
    if path.suffix == ".safetensors":
        path.write_bytes(damaged_bytes(path.read_bytes(), rng, 1500))
    elif path.suffix == ".jinja":
        path.write_text(rng.choice(["{{ nothing.at_all }}", "{% if %}", "{{ 1 / 0 }}", "{{ [0]"]))
    else:
        path.write_text(damaged_json(path.read_text(), rng), errors="surrogatepass")


def _paths(value, above=()):
    """Paths to the fields of parsed JSON; of a long list or object, to the first few."""
    steps = value if isinstance(value, dict) else range(len(value))
    for step in list(steps)[:30]:
        yield (*above, step)
        if isinstance(value[step], (dict, list)):
            yield from _paths(value[step], (*above, step))

"""Sixteen questions behind one long system prompt, which is read once.

Run `python examples/shared_prompt.py --help` for the options.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import jax
import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from examples import inputs, llama, weights
from examples.decoder import Batch, CacheOptions, Decoder, Tally, plan
from examples.prompts import Prompt, encode_prompts
from examples.tokenizer import Tokenizer
from ferrum_jax.integrations.generate import GenerateOptions

SYSTEM_PROMPT = """\
You answer questions of visitors to a small museum of clocks. These are the rules of the house.
The museum is open from Tuesday to Sunday, from ten in the morning to six in the evening; the last
visitors are let in at half past five. It is closed on Mondays and on the first day of the year.
Tickets cost eight coins, five for students and pensioners, and nothing for children under twelve.
Dogs stay outside, but for those that lead the blind. Photographs may be taken without a flash.
The collection has four rooms. The first shows sundials and water clocks, the oldest from Egypt.
The second shows clocks of towers, with weights as heavy as a man, and a wheel that was cut by hand
in fifteen hundred and twelve. The third shows watches, among them one that a sea captain wore for
thirty years, which lost eleven seconds in all that time. The fourth shows clocks of our own days:
quartz, radio and a caesium clock that would be wrong by one second in a million years. Every day
at noon all clocks of the second room strike together; stand by the door if you have weak ears.
The workshop behind the fourth room repairs watches of visitors on Thursdays. The cafe in the yard
serves coffee, soup and cake until five. Lifts go to all rooms. Coats and bags are left at the
entrance, where lockers take a coin and give it back. Be brief and friendly. If you do not know an
answer, say so, and send the visitor to the desk at the entrance.
"""

QUESTIONS = (
    "When do you close today?",
    "What does a ticket for a student cost?",
    "May I bring my dog?",
    "Which room has the oldest clock?",
    "Where can I have my watch repaired?",
    "What happens at noon?",
    "Can I take a photograph?",
    "Is there something to eat?",
    "How exact is the best clock?",
    "Do I have to carry my coat?",
    "Are you open on Mondays?",
    "My son is ten. Does he need a ticket?",
    "What is in the third room?",
    "I use a wheelchair. Can I see everything?",
    "How heavy are the weights of the tower clocks?",
    "What is a water clock?",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Answers with and without the prefix cache, compares, and reports."""
    args = _parse(arguments)
    path = weights.resolve(args.model)
    print(f"Loading {path.name} on {jax.devices()[0].device_kind}", file=sys.stderr)
    config, params, tokenizer = weights.load(path, "float32")
    model = llama.from_params(config, params)
    questions = QUESTIONS[: args.questions]
    texts = [tokenizer.apply_chat(question, SYSTEM_PROMPT) for question in questions]
    given = [Prompt("a question", text) for text in texts]
    prompts = encode_prompts(given, tokenizer, config.vocab_size, chat=False)
    with tqdm.tqdm(total=2 * len(prompts) * args.max_new_tokens, unit="tok") as progress:
        plain, plain_tally = _answer(
            model, prompts, tokenizer, args.max_new_tokens, progress, False
        )
        shared, tally = _answer(model, prompts, tokenizer, args.max_new_tokens, progress, True)
    for question, answer in zip(questions, shared, strict=True):
        print(f"\n> {question}\n{tokenizer.decode(answer).strip()}")
    saved = plain_tally.prefill_seconds - tally.prefill_seconds
    print(f"\nprompts           {tally.prompt_tokens:>7} tokens")
    print(f"read once for all {tally.reused_tokens:>7} tokens, and not again")
    print(f"prefill without   {plain_tally.prefill_seconds:>7.2f} s")
    print(f"prefill with      {tally.prefill_seconds:>7.2f} s, {saved:.2f} s saved")
    print(f"blocks at most    {tally.peak_blocks:>7} instead of {plain_tally.peak_blocks}")
    print(f"answers           {'equal' if shared == plain else 'DIFFERENT':>7}")
    if args.json:
        figures = {
            "equal": shared == plain,
            "prompt_tokens": tally.prompt_tokens,
            "reused_tokens": tally.reused_tokens,
            "prefill_seconds": tally.prefill_seconds,
            "prefill_seconds_without": plain_tally.prefill_seconds,
        }
        inputs.write_json(args.json, figures)
    if shared != plain:
        raise SystemExit("The prefix cache has changed an answer. Please report this as a bug.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", metavar="PATH", help="GGUF file or safetensors folder")
    parser.add_argument(
        "--questions",
        type=int,
        choices=range(2, len(QUESTIONS) + 1),
        default=len(QUESTIONS),
        metavar="N",
        help="the first N of %(default)s",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=inputs.parse_count,
        default=32,
        metavar="N",
        help="a question (%(default)s)",
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures")
    args = parser.parse_args(arguments)
    inputs.check_output(parser, "--json", args.json)
    return args


def _answer(
    model: llama.Llama,
    prompts: list[list[int]],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    progress: "tqdm.tqdm",
    caches_prefixes: bool,
) -> tuple[list[list[int]], Tally]:
    """Returns what the model answers, and what it took."""
    options = CacheOptions(caches_prefixes=caches_prefixes)
    batches, manager = plan(model.config, prompts, max_new_tokens, options)
    decoder = Decoder(
        model,
        manager,
        len(prompts),
        max_new_tokens,
        GenerateOptions(max_new_tokens=16, stop_token_ids=tokenizer.eos_token_ids),
        caches_prefixes=caches_prefixes,
    )
    decoder.warm_up(batches)
    answers: Batch = {}
    for batch in batches:
        answers |= decoder.run(batch, progress)
    return [answers[number] for number in range(len(prompts))], decoder.tally


if __name__ == "__main__":
    inputs.run_script(main)

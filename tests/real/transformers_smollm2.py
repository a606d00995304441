"""Computes with Hugging Face transformers what test_smollm2.py expects of perparam; needs torch.

    python transformers_smollm2.py FOLDER RESULT GREEDY_TOKENS < job.json

The job has `texts` to tokenize, and `questions` to answer. RESULT.json gets the token ids of the texts, and the prompt,
ids and greedy answer of each question; RESULT.npz the float32 logits of the prompts, `0`, `1`, ….
"""

import json
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, result: str, greedy_tokens: str) -> None:
    job = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    answers, logits = [], {}
    for i, question in enumerate(job["questions"]):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        encoded = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            logits[str(i)] = model(**encoded).logits[0].numpy()
            tokens = model.generate(**encoded, max_new_tokens=int(greedy_tokens), do_sample=False)[0]
        ids = encoded["input_ids"][0].tolist()
        answer = tokens[len(ids) :].tolist()
        text = tokenizer.decode(answer, skip_special_tokens=True)
        answers.append({"prompt": prompt, "ids": ids, "tokens": answer, "text": text})
    texts = [tokenizer(text)["input_ids"] for text in job["texts"]]
    np.savez(f"{result}.npz", **logits)
    with open(f"{result}.json", "w") as file:
        json.dump({"texts": texts, "answers": answers}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

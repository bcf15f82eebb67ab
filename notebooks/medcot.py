# ruff: noqa
# mypy: ignore-errors
# %% [markdown]
# # medcot: a reasoning model learns medicine, with proof
#
# The whole job in one notebook: the model answers before training and after, both are graded, and a report shows what
# changed and whether the change can be believed. With a GPU it is DeepSeek-R1-Distill-Llama-8B in 4 bit on 500 medical
# chains of thought; without one, a small model on problems that medcot makes itself, in some ten minutes.
#
# For research and education. Not for diagnosis, treatment or any other decision about a patient.
#
# Cells tagged `install` or `network` need a network, and an account where they push.
# %% [markdown] tags=kaggle
# **Set-up on Kaggle**: attach a checkout of medcot as a data set, switch the internet on, and choose a GPU (T4) or none.
# Secrets are optional: `HUGGINGFACE_TOKEN` and `wandb` under Add-ons → Secrets are found by themselves.
# %% [markdown] tags=colab
# **Set-up on Colab**: upload or clone a checkout of medcot to `/content/medcot`, and choose a GPU (T4) or none. Secrets
# are optional: `HF_TOKEN` and `WANDB_API_KEY` under the key symbol are found by themselves.
# %% tags=install,kaggle
# %pip install -q -c /kaggle/input/medcot/constraints.txt /kaggle/input/medcot
# %% tags=install,colab
# %pip install -q -c /content/medcot/constraints.txt /content/medcot
# %% [markdown]
# What is yours to change. `edition` chooses between GPU and CPU by itself; any recipe of `medcot recipes` will do, and any
# key of it, as in `overrides = ["train.max_steps=10", "data=my.jsonl"]`.
# %% tags=parameters
import torch

edition = "gpu" if torch.cuda.is_available() else "cpu"
recipe = {"gpu": "tutorial-8b", "cpu": "default"}[edition]
overrides = []
max_new_tokens = 1200
question = "Why does furosemide lower potassium?"
repository = "your-name/my-medical-reasoner"
# %% tags=parameters,kaggle
folder = "/kaggle/working/run"
# %% tags=parameters,colab
folder = "/content/run"
# %% [markdown]
# ## Before it begins
#
# What the run will do: every setting, rows, steps, memory, time, and one row as the model will see it.
# %%
import medcot

print(edition, recipe)
medcot.plan(recipe, overrides=overrides)
# %% [markdown]
# ## The job
#
# If the session ends in the middle, `medcot.run(out=folder, resume=True)` goes on where it was.
# %% tags=run
run = medcot.run(recipe, overrides=overrides, out=folder)
# %% [markdown]
# ## What came of it
# %%
print(f"loss {run['train']['loss_first']:.3f} → {run['train']['loss_last']:.3f}")
if "before" in run["eval"]:
    before, after = run["eval"]["before"], run["eval"]["after"]
    print(f"accuracy {before['accuracy']:.1%} → {after['accuracy']:.1%} of {after['n']}: {run['eval']['verdict']}")
# %% [markdown]
# The report is one file that opens anywhere; here it is in the notebook.
# %%
from html import escape
from pathlib import Path

from IPython.display import HTML

report = (Path(run["folder"]) / "report.html").read_text(encoding="utf-8")
HTML(
    f'<iframe srcdoc="{escape(report)}" style="width: 100%; height: 900px; border: 0" sandbox="allow-scripts"></iframe>'
)
# %% [markdown]
# ## A question of your own
#
# Thinking first, then the answer.
# %% tags=ask
from medcot.pipeline import ask

text = ask(
    question, Path(run["folder"]), max_new_tokens=max_new_tokens, on_text=lambda piece, in_think: print(piece, end="")
)
# %% [markdown]
# ## Keeping it
#
# The adapter is plain PEFT: `PeftModel.from_pretrained(base, folder)` opens it without medcot.
# %%
import shutil

print(shutil.make_archive(f"{folder}-adapter", "zip", Path(run["folder"]) / "adapter"))
# %% [markdown]
# To the Hub, privately, and read back to compare; it needs a token that may write.
# %% tags=network
from medcot.hub import push_folder
from medcot.secrets import SecretName, find_secret

secret = find_secret(SecretName.HUGGING_FACE)
print(push_folder(Path(run["folder"]) / "adapter", repository, token=secret.value if secret else None))

# ruff: noqa
# mypy: ignore-errors
# %% [markdown]
# # From the Unsloth notebook to medcot
#
# The well-known tutorial fine-tunes DeepSeek-R1-Distill-Llama-8B on medical chains of thought with Unsloth and TRL.
# Here are its steps, on medcot. What changes is marked **changed**: the cell that installs, secrets, the import line,
# names on the Hub, and `.to("cuda")`, which becomes `.to(model.device)` so that a CPU will do. Everything else is as it
# was, arguments included; those that have no meaning here are accepted, and a line says so.
#
# Not for diagnosis, treatment or any other decision about a patient.
#
# Cells tagged `install` or `network` need a network, and an account where they push.
# %% [markdown]
# **Changed**: what is installed. `medcot` is a checkout of the project, for example an attached Kaggle data set.
# %% tags=install
# %pip install -q -c /kaggle/input/medcot/constraints.txt "/kaggle/input/medcot[wandb]"
# %% [markdown]
# **Changed**: names of your own. Everything you may want to change is in this cell.
# %% tags=parameters
model_name = "unsloth/DeepSeek-R1-Distill-Llama-8B"  # on a CPU: "embedded", which medcot fetches
dataset_source = {"path": "FreedomIntelligence/medical-o1-reasoning-SFT", "name": "en", "split": "train[0:500]"}
new_model_local = "DeepSeek-R1-Medical-COT"
new_model_online = "your-name/DeepSeek-R1-Medical-COT"
max_steps = 60
max_new_tokens = 1200
# %% [markdown]
# **Changed**: secrets, under the names that you gave them. medcot finds `HF_TOKEN` and Kaggle's `HUGGINGFACE_TOKEN` by
# itself, so `hf_token = None` will do too.
# %% tags=network
from kaggle_secrets import UserSecretsClient

user_secrets = UserSecretsClient()
hf_token = user_secrets.get_secret("HUGGINGFACE_TOKEN")
wandb_token = user_secrets.get_secret("wandb")
# %% tags=network
import wandb

wandb.login(key=wandb_token)
run = wandb.init(
    project="Fine-tune-DeepSeek-R1-Distill-Llama-8B on Medical COT Dataset",
    job_type="training",
    anonymous="allow",
)
# %% [markdown]
# ## The model
#
# **Changed**: the import line.
# %% tags=import
from medcot.compat import FastLanguageModel, SFTTrainer, is_bfloat16_supported

# %% tags=load
max_seq_length = 2048
dtype = None
load_in_4bit = True

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=model_name,
    max_seq_length=max_seq_length,
    dtype=dtype,
    load_in_4bit=load_in_4bit,
    token=hf_token,
)
# %% [markdown]
# ## One question before training
# %%
prompt_style = """Below is an instruction that describes a task, paired with an input that provides further context.
Write a response that appropriately completes the request.
Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure a logical and accurate response.

### Instruction:
You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment planning.
Please answer the following medical question.

### Question:
{}

### Response:
<think>{}"""
# %% [markdown]
# **Changed**: `.to(model.device)`.
# %% tags=ask_before
question = "A 61-year-old woman with a long history of involuntary urine loss during activities like coughing or sneezing but no leakage at night undergoes a gynecological exam and Q-tip test. Based on these findings, what would cystometry most likely reveal about her residual volume and detrusor contractions?"

FastLanguageModel.for_inference(model)
inputs = tokenizer([prompt_style.format(question, "")], return_tensors="pt").to(model.device)

outputs = model.generate(
    input_ids=inputs.input_ids,
    attention_mask=inputs.attention_mask,
    max_new_tokens=max_new_tokens,
    use_cache=True,
)
response = tokenizer.batch_decode(outputs)
print(response[0].split("### Response:")[1])
# %% [markdown]
# ## The rows
# %%
train_prompt_style = """Below is an instruction that describes a task, paired with an input that provides further context.
Write a response that appropriately completes the request.
Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure a logical and accurate response.

### Instruction:
You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment planning.
Please answer the following medical question.

### Question:
{}

### Response:
<think>
{}
</think>
{}"""
# %% tags=prepare
EOS_TOKEN = tokenizer.eos_token  # must be added, or the model does not learn to stop


def formatting_prompts_func(examples):
    texts = []
    for question_, cot, output in zip(examples["Question"], examples["Complex_CoT"], examples["Response"]):
        texts.append(train_prompt_style.format(question_, cot, output) + EOS_TOKEN)
    return {"text": texts}


from datasets import load_dataset

dataset = load_dataset(**dataset_source)
dataset = dataset.map(formatting_prompts_func, batched=True)
dataset["text"][0]
# %% [markdown]
# ## The adapter and the trainer
# %% tags=prepare
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)
# %% tags=prepare
from transformers import TrainingArguments

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=max_seq_length,
    dataset_num_proc=2,
    args=TrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=5,
        max_steps=max_steps,
        learning_rate=2e-4,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        logging_steps=10,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir="outputs",
    ),
)
# %% tags=train
trainer_stats = trainer.train()
# %%
trainer_stats.metrics
# %% tags=network
wandb.finish()
# %% [markdown]
# ## The same question again
# %% tags=ask_after
FastLanguageModel.for_inference(model)
inputs = tokenizer([prompt_style.format(question, "")], return_tensors="pt").to(model.device)

outputs = model.generate(
    input_ids=inputs.input_ids,
    attention_mask=inputs.attention_mask,
    max_new_tokens=max_new_tokens,
    use_cache=True,
)
response = tokenizer.batch_decode(outputs)
print(response[0].split("### Response:")[1])
# %% [markdown]
# ## Saving
#
# Adapter and merged weights go into one folder. transformers would find the adapter beside the merged weights and apply
# it once more; so the second call moves it to `adapter/` in that folder.
# %% tags=save_adapter
model.save_pretrained(new_model_local)
tokenizer.save_pretrained(new_model_local)
# %% tags=save_merged
model.save_pretrained_merged(new_model_local, tokenizer, save_method="merged_16bit")
# %% [markdown]
# And to the Hub, into one repository, privately; `private=False` makes it public.
# %% tags=network,push
model.push_to_hub(new_model_online)
tokenizer.push_to_hub(new_model_online)
model.push_to_hub_merged(new_model_online, tokenizer, save_method="merged_16bit")
# %% [markdown]
# ## What medcot adds
#
# The notebook compares two answers by eye. `medcot run tutorial-8b` is the same job with 200 graded questions before and
# after, intervals and a report; `medcot eval quick --model DeepSeek-R1-Medical-COT` grades what was saved here.

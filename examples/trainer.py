"""A stock transformers.Trainer, the tuner's optimiser, and one callback; a tiny random BERT."""

import torch
import transformers

import unmask
from unmask.integrations.transformers import UnmaskCallback

transformers.set_seed(0)

config = transformers.BertConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    num_labels=2,
)
model = transformers.BertForSequenceClassification(config)

# Does the sentence begin with a word of the upper half of the vocabulary?
sentences = torch.randint(64, (800, 8))
rows = [{"input_ids": words, "labels": int(words[0] >= 32)} for words in sentences]

tuner = unmask.attach(model, unmask.id3(budget=0.05), train_fully="classifier*")
optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(
        "run",
        num_train_epochs=3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=200,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=rows[:600],
    eval_dataset=rows[600:],
    compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
    optimizers=(optimizer, None),
    callbacks=[UnmaskCallback(tuner)],
)
trainer.train()

accuracy = trainer.evaluate()["eval_accuracy"]
print(f"accuracy {accuracy:.3f} with {tuner.active:,} scalars and the classifier; {tuner.delta()}")
assert accuracy > 0.8

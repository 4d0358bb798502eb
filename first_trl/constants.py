"""Names and rules that several parts of the package must agree on, each written once. Nothing is computed here."""

import re

IGNORED = -100  # label of a token outside the loss, as in torch and TRL

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
TAILS = ("bucket", "renormalize")
RECALIBRATION_METHODS = ("temperature", "probability", "label_smoothing", "none")
CRITERIA = ("ece", "nll")
POSITIONS = ("answer", "all")

STAGES = ("sft", "cache", "calibrate", "distill", "evaluate", "push")

# What the arms of a report are, in its order. A recipe may add arms, and call none as one of the first three.
ARMS = {
    "teacher": "the fine-tuned teacher",
    "teacher_recalibrated": "the teacher, its confidence recalibrated on validation",
    "base": "the student before training",
    "fine_tuned": "the student fine-tuned on the labels, without a teacher",
    "distilled": "the student distilled from the teacher as it is",
    "first": "the student distilled from the recalibrated teacher",
}
REPORT_ARMS = ("teacher", "teacher_recalibrated", "base")
FOCUS = "first"  # the arm that a report is about
DEFAULT_ARMS = {"fine_tuned": {"trainer": "sft"}, "distilled": {"recalibration_method": "none"}, "first": {}}
POST_HOC = "_post_hoc"  # suffix of a student's name: under one temperature, as it ships where it carries that

PREDICT_FILE = "predict.json"

# A repository on the Hub, `owner/name`, or `name` alone for the oldest models and datasets.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)

FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,99}", re.ASCII)  # of an arm or a test set

# File suffix -> the builder of `datasets` that reads it.
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

# Texts that look like credentials: tokens of the Hub, GitHub, GitLab, Slack and AWS, keys, and addresses with one.
SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[opsur]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}"
    r"|\bxox[abprs]-[\w-]{10,}|\bAKIA[0-9A-Z]{16}\b|\bsk-(?=[\w-]*\d)[\w-]{16,}|://[^\s/@:\"]*:[^\s/@\"]+@"
    r"|[?&](?:\w*token|\w*key|auth|password|pass|pwd|secret|sig|signature)=[^&\s\"]{2,}"
)

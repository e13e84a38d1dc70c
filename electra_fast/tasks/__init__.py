"""What a discriminator is fine-tuned for: the files of a task, its head, its loss and its metrics."""

from electra_fast.tasks.answer import AnswerQuestions
from electra_fast.tasks.choose import Choose
from electra_fast.tasks.classify import Classify
from electra_fast.tasks.intent import Intent
from electra_fast.tasks.rank import Rank
from electra_fast.tasks.regress import Regress
from electra_fast.tasks.tag import Tag
from electra_fast.tasks.write import Write

TASKS = {task.name: task for task in (Classify, Regress, Tag, AnswerQuestions, Choose, Rank, Intent, Write)}

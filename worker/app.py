"""The Celery app: ``celery -A worker.app worker -Q train,ingest``. Also what Flower reads."""

from shared.queue import make_celery
from shared.settings import Settings
from worker import lifecycle

app = make_celery(Settings.read().broker)
app.conf.imports = ("worker.tasks",)
lifecycle.connect(app)

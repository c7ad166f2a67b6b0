"""What runs at a site in NVIDIA FLARE's job process: the executor of the tasks, and the filter of what leaves.

NVIDIA FLARE builds both by name: the executor because a job asks for it, the filter because the site's own policy
(`federated.deployment.policy`) does. Neither takes arguments, so that a job cannot change them. A site answers with its
declared facts, an update, or a word for why there is none: texts of errors, which may hold paths, stay in its log.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from nvflare.apis.executor import Executor
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.apis.signal import Signal

from dnnlib.cli import StopRequest, UserError
from dnnlib.process_lock import LockHeld, ProcessLock
from dnnlib.workers import watch_parent
from federated.agreement import Agreement
from federated.deployment.job import DECLARE, TRAIN, SiteSettings, load_settings
from federated.deployment.plan import DeclaredFacts, SitePlan, Unsuitable, answer_questions
from federated.exchange import Refused, check_update
from federated.privacy import sent_updates
from federated.site import Site, SiteStopped
from torch_utils.device import choose_device, choose_precision, ran_out_of_memory
from training.config import RunSettings
from training.dataset import ImageDataset
from training.loop import EXIT_DIVERGED, EXIT_STOPPED, set_backends
from training.run_folder import LOCK_NAME
from training.sampling import image_weights

_PATIENCE = 60  # seconds for the process of an earlier job to end

# Keys of tasks, and of answers: exactly one of the latter.
QUESTIONS, PLAN, GLOBAL = "questions", "plan", "global"
FACTS, UPDATE, FAILURE = "facts", "update", "failure"
# Why a site has no update -> what the server's log says.
FAILURES = {
    "stopped": "it was asked to stop", "diverged": "its training steps kept failing",
    "refused": "it refused the message of the server", "unsuitable": "its data or files do not suit the run",
    "memory": "it ran out of memory", "failed": "its program failed"}


class AbortRequest(StopRequest):
    """A request to stop that comes from NVIDIA FLARE's signal."""

    def __init__(self, abort_signal: Signal):
        super().__init__()
        self._signal = abort_signal

    def wanted(self) -> bool:
        if self.reason is None and self._signal.triggered:
            self.reason = "the run was stopped"
        return self.reason is not None


class SiteExecutor(Executor):
    """Trains on the images of one institution, as the simulation's `Site` does."""

    current: "SiteExecutor | None" = None  # of this process, for the filter

    def __init__(self):
        super().__init__()
        self._site: Site | None = None
        self._facts: DeclaredFacts | None = None
        self._stop: AbortRequest | None = None  # while the site trains
        self._is_ending = False  # a signal asked for it
        SiteExecutor.current = self
        signal.signal(signal.SIGTERM, self._on_signal)  # of federate.py site, before it ends its processes
        watch_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))  # it was killed
        # Workers that load images are not forked from this process, whose other threads hold connections.
        multiprocessing.set_start_method("spawn", force=True)

    @property
    def agreement(self) -> Agreement | None:
        """The site's own agreement; None before the first round."""
        return None if self._site is None else self._site.agreement

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Return the answer to a task. Raises nothing: an exception's text would not stay at the site."""
        tasks: dict[str, Callable[..., Shareable]] = {DECLARE: self._declare, TRAIN: self._train}
        if task_name not in tasks:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        kit = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir())
        try:
            settings = load_settings(kit, SiteSettings)
            return tasks[task_name](shareable, settings, fl_ctx.get_identity_name(), abort_signal)
        except SiteStopped as stopped:
            if self._is_ending:
                os._exit(EXIT_STOPPED)  # its state is saved; NVIDIA FLARE would ask for the next task
            code, why = "diverged" if stopped.exit_code == EXIT_DIVERGED else "stopped", None
        except (Refused, Unsuitable) as error:
            code, why = "refused", str(error)
        except UserError as error:
            code, why = "unsuitable", str(error)
        except Exception as error:  # PyTorch reports a lack of memory in several ways
            code = "memory" if ran_out_of_memory(error) else "failed"
            why = f"{type(error).__name__}: {error}"
            self.logger.exception("the task failed")
        if code != "stopped":  # the next task may come after the cause is mended
            self._close()
        if why is not None:
            self.logger.error("%s: %s", FAILURES[code], why)
        return _answer({FAILURE: code})

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Release the site's folder at the end."""
        from nvflare.apis.event_type import EventType

        if event_type == EventType.END_RUN:
            self._close()

    def _declare(self, task: Shareable, settings: SiteSettings, name: str, abort_signal: Signal) -> Shareable:
        device = choose_device(settings.device).name
        self._facts = answer_questions(task[QUESTIONS], settings.data, device=device)
        return _answer({FACTS: self._facts.to_bytes()})

    def _train(self, task: Shareable, settings: SiteSettings, name: str, abort_signal: Signal) -> Shareable:
        if self._site is None:
            self._site = self._open(task[PLAN], settings, name)
        self._stop = self._site.loop.stop = AbortRequest(abort_signal)
        try:
            update = self._site.train_round(task[GLOBAL])
            if self._is_ending:  # the signal came in the last iteration; the site makes the same update when it is back
                os._exit(EXIT_STOPPED)
            return _answer({UPDATE: update})
        finally:
            self._stop = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """End after the iteration that runs, with a saved state; at once if the site does not train."""
        if self._stop is None:
            os._exit(EXIT_STOPPED)
        self._is_ending, self._stop.reason = True, f"{signal.Signals(number).name} received"

    def _open(self, text: str, settings: SiteSettings, name: str) -> Site:
        """Open the data set and the site's folder for the run of a plan."""
        import torch

        if self._facts is None:
            raise Unsuitable("the server sent a round before it asked for the facts")
        plan = SitePlan.from_text(text, site=name, facts=self._facts)
        folder = Path(settings.outdir) / plan.run / f"site-{name}"
        plan.check_privacy(name, settings.max_epsilon, sent_updates(folder))
        config, federation = plan.config, plan.config.federation
        workers = config.num_workers if settings.workers is None else settings.workers
        config = replace(config, num_workers=workers)
        device = choose_device(settings.device)
        precision = choose_precision("auto", device.name, config.precision)
        if precision.warning is not None:
            self.logger.warning(precision.warning)
        dataset = ImageDataset(settings.data, use_labels=config.dataset.use_labels, xflip=config.dataset.xflip)
        run = RunSettings(outdir=settings.outdir, data=settings.data, device=device.name, balance=plan.balance)
        set_backends(config)
        if folder.exists():  # the process of an earlier job may still save its state there
            lock = ProcessLock(folder / LOCK_NAME)
            with suppress(LockHeld):
                lock.acquire(patience=_PATIENCE)
                lock.release()
        self.logger.info("takes part in %s for %d rounds on %s", plan.run, federation.rounds, device.name)
        return Site(name, config=config, settings=run, schedule=plan.schedule(), dataset=dataset,
                    weights=image_weights(plan.balance, dataset), folder=folder, device=torch.device(device.name),
                    stop=AbortRequest(Signal()), is_new=name in plan.new, max_epsilon=settings.max_epsilon)

    def _close(self) -> None:
        if self._site is not None:
            self._site.close()
        self._site = None


class OutgoingFilter(Filter):
    """Lets out of a site what it agreed to and nothing else: declared facts, an update, or a word of FAILURES.

    An update has the agreed tensors, with their shapes and dtypes, and the declared numbers: see
    `federated.exchange.check_update`. What does not pass is replaced by a failure, with the reason in the site's log.
    """

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Return a new answer with the checked content; headers of the old one stay behind."""
        content = {key: value for key, value in shareable.items() if key != ReservedHeaderKey.HEADERS}
        try:
            return _answer(self._checked(content, shareable, fl_ctx.get_identity_name()))
        except (Refused, Unsuitable) as error:
            self.logger.error("an answer that was not agreed on does not leave this site: %s", error)
            return _answer({FAILURE: "refused"})

    def _checked(self, content: dict, shareable: Shareable, name: str) -> dict:
        executor = SiteExecutor.current
        if list(content) == [FACTS]:
            DeclaredFacts.from_bytes(content[FACTS])
        elif list(content) == [UPDATE]:
            if executor is None or executor.agreement is None:
                raise Refused("there is an update before the first round")
            check_update(content[UPDATE], executor.agreement, site=name)
        elif list(content) != [FAILURE] or content[FAILURE] not in FAILURES:
            if not content and shareable.get_return_code() != ReturnCode.OK:
                return {FAILURE: "failed"}
            raise Refused(f"it has {', '.join(map(str, content)) or 'nothing'}; expected facts, an update, or why "
                          "there is none")
        return content


def _answer(content: dict) -> Shareable:
    shareable = Shareable()
    shareable.update(content)
    return shareable

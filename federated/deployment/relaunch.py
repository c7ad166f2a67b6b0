"""What runs in the server's main process beside NVIDIA FLARE: it starts a run's job anew when that is needed.

NVIDIA FLARE gives a job to the sites that are connected when it starts, and a site that is restarted does not get back
into it. So the job is stopped and the same job is submitted again when a site registers that is not in the running job,
when the process of a site's job has died but the site is there, and when a job ends by a fault. The run continues from
its last complete round, and each site from its own state.
"""

import threading
import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, RunProcessKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey, RunStatus

from federated.deployment.job import RunProgress, ServerSettings, load_settings

_SETTLE = 3.0  # seconds in which further sites may register before a job is stopped
_LOOK = 10.0  # seconds between two looks for sites whose job process died
_GONE = 30.0  # seconds at most after which such a process counts as dead: a site that is being stopped ends it first
_TRIES = 3  # of jobs that end by a fault in the same round
# After a job was started anew for a site, the next one is not for it: the seconds are doubled each time, and counted
# afresh after a round in which the site took part. Its machine may refuse each job, as with a full disk.
_AGAIN, _AGAIN_AT_MOST = 30.0, 3600.0
# Of the meta data of a job, what a job that is submitted again keeps.
_KEYS = [key.value for key in (
    JobMetaKey.JOB_NAME, JobMetaKey.JOB_FOLDER_NAME, JobMetaKey.DEPLOY_MAP, JobMetaKey.RESOURCE_SPEC,
    JobMetaKey.CONTENT_LOCATION, JobMetaKey.RESULT_LOCATION, JobMetaKey.APPROVALS, JobMetaKey.MIN_CLIENTS,
    JobMetaKey.MANDATORY_CLIENTS, JobMetaKey.DATA_STORAGE_FORMAT, JobMetaKey.STUDY, JobMetaKey.SUBMITTER_NAME,
    JobMetaKey.SUBMITTER_ORG, JobMetaKey.SUBMITTER_ROLE)]


class Relauncher(FLComponent):
    """Submits the job of a run again when a lost site returns, or after a fault."""

    def __init__(self):
        super().__init__()
        self._lock = threading.Lock()
        self._returning: set[str] = set()  # jobs that are stopped because a site is back
        self._looked = time.monotonic()
        self._began: dict[str, float] = {}  # job -> when; what is noted of sites before is of another job
        self._starts: dict[str, str] = {}  # job -> the first job of the same `start`, if it is another
        self._faults: dict[str, tuple[int, int]] = {}  # first job -> round and number of faults in it
        # First job and site -> round, how often, and when a job was started anew for the site.
        self._returns: dict[tuple[str, str], tuple[int, int, float]] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        engine = fl_ctx.get_engine()
        if event_type == EventType.SYSTEM_START:
            self._later(self._end_lost_jobs, engine)
        elif event_type == EventType.JOB_STARTED:
            self._began[fl_ctx.get_prop(FLContextKey.EVENT_DATA)[JobMetaKey.JOB_ID.value]] = time.time()
        elif event_type == EventType.CLIENT_REGISTER_PROCESSED:
            self._later(self._restart_jobs, engine, self._kit(fl_ctx), delay=_SETTLE)
        elif event_type == EventType.CLIENT_HEARTBEAT_PROCESSED and time.monotonic() - self._looked > _LOOK:
            self._looked = time.monotonic()
            self._later(self._restart_jobs, engine, self._kit(fl_ctx))
        elif event_type == EventType.JOB_COMPLETED:
            job_id = (fl_ctx.get_prop(FLContextKey.EVENT_DATA) or {}).get(JobMetaKey.JOB_ID.value)
            self._later(self._after_job, engine, job_id, self._kit(fl_ctx))

    def _later(self, work: Any, *arguments: Any, delay: float = 0.0) -> None:
        """Do something in a thread: events are handled within NVIDIA FLARE's locks."""
        timer = threading.Timer(delay, self._logged, (work, *arguments))
        timer.daemon = True
        timer.start()

    def _logged(self, work: Any, *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception:
            self.logger.exception("a run could not be started anew")

    @staticmethod
    def _kit(fl_ctx: FLContext) -> Path:
        return Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir())

    def _end_lost_jobs(self, engine: Any) -> None:
        """Note that jobs which ran when an earlier server was killed have ended: `start` continues their runs."""
        with engine.new_context() as fl_ctx:
            engine.job_runner.update_abnormal_finished_jobs(list(engine.run_processes), fl_ctx)

    def _restart_jobs(self, engine: Any, kit: Path) -> None:
        """Stop the running jobs that a connected site is not part of, so that they are submitted again."""
        connected = {token: client.name for token, client in dict(engine.client_manager.clients).items()}
        gone = time.time() - min(_GONE, load_settings(kit, ServerSettings).site_timeout)
        for job_id, process in dict(engine.run_processes).items():
            taking_part = {connected[token] for token in connected if token in process[RunProcessKey.PARTICIPANTS]}
            with engine.new_context() as fl_ctx:
                name = engine.job_def_manager.get_job(job_id, fl_ctx).meta[JobMetaKey.JOB_NAME.value]
                state = RunProgress.read(kit, name, job_id)
                if state is None:
                    continue
                died = {site for site, entry in state["sites"].items()
                        if entry["state"] == "lost" and self._began.get(job_id, gone) < entry["since"] < gone}
                with self._lock:
                    back = self._due(job_id, state, {*connected.values()} - taking_part, taking_part)
                    died = (died & set(connected.values())) - back
                    if job_id in self._returning or not (back or (died and self._may_try(job_id, state["round"]))):
                        continue
                    self._returning.add(job_id)
                    self._note_return(job_id, back, state["round"])
                self.logger.info(f"{', '.join(sorted(back | died))} can take part again; job {job_id} is started anew")
                engine.job_runner.stop_run(job_id, fl_ctx)

    def _after_job(self, engine: Any, job_id: str, kit: Path) -> None:
        """Submit a job that ended again if its run should go on."""
        manager = engine.job_def_manager
        with engine.new_context() as fl_ctx:
            meta = manager.get_job(job_id, fl_ctx).meta
            name, status = meta[JobMetaKey.JOB_NAME.value], meta[JobMetaKey.STATUS.value]
            state = RunProgress.read(kit, name, job_id)
            if state is None:
                return
            with self._lock:
                returns = job_id in self._returning
                self._returning.discard(job_id)
            was_stopped = status == RunStatus.FINISHED_ABORTED.value and not returns
            if state["state"] not in ("training", "waiting") or was_stopped:
                return
            if not returns and not self._may_try(job_id, state["round"]):
                self.logger.error(f"{name} ended {_TRIES} times by a fault in round {state['round']}; it is not "
                                  "started again")
                return
            found = manager.clone(job_id, {key: meta[key] for key in _KEYS if key in meta}, fl_ctx)
            self._starts[found[JobMetaKey.JOB_ID.value]] = self._first(job_id)
            self.logger.info(f"{name} continues in job {found[JobMetaKey.JOB_ID.value]}")

    def _first(self, job_id: str) -> str:
        return self._starts.get(job_id, job_id)

    def _may_try(self, job_id: str, number: int) -> bool:
        first = self._first(job_id)
        before, count = self._faults.get(first, (number, 0))
        count = count + 1 if before == number else 1
        self._faults[first] = number, count
        return count <= _TRIES

    def _due(self, job_id: str, state: dict[str, Any], absent: set[str], taking_part: set[str]) -> set[str]:
        """Return those of the connected sites that are not in a job for which it is started anew now."""
        first, number, due = self._first(job_id), state["round"], set()
        for site in taking_part:
            if number > self._returns.get((first, site), (number, 0, 0.0))[0]:
                del self._returns[first, site]
        for site in absent if state["members"] is None else absent & set(state["members"]):
            _, count, when = self._returns.get((first, site), (0, 0, 0.0))
            if not count or time.monotonic() - when >= min(_AGAIN * 2 ** (count - 1), _AGAIN_AT_MOST):
                due.add(site)
        return due

    def _note_return(self, job_id: str, back: set[str], number: int) -> None:
        for site in back:
            before, count, _ = self._returns.get((self._first(job_id), site), (0, 0, 0.0))
            self._returns[self._first(job_id), site] = max(before, number), count + 1, time.monotonic()

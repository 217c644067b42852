"""Jobs: reposing in the background, for exports too long for one request."""

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel

from service.errors import JobFailed, JobNotFinished, JobNotFound
from service.headers import APPLIED_HEADERS
from service.job_store import Job
from service.jobs import Jobs
from service.openapi import problems
from service.production import Times
from service.reposing import Reposing
from service.routes.avatars import AvatarIdPath
from service.routes.repose import REQUEST
from service.schemas import ReposeQuery
from service.security import Principal

JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="As `POST /avatars/{id}/jobs` answered.")]
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


class JobList(BaseModel):
    """Jobs that are waited for or worked on, and those that have ended and are still kept."""

    jobs: list[Job]


def may_see(job: Job, principal: Principal) -> bool:
    """A job is its owner's; one from before there were owners is everybody's."""
    return job.owner in (None, principal.name) or "admin" in principal.planes


def job_routes(reposing: Reposing, jobs: Jobs) -> APIRouter:
    """`POST /avatars/{id}/jobs`, `GET /jobs`, `GET` and `DELETE /jobs/{id}`, `GET /jobs/{id}/result`."""
    router = APIRouter(tags=["jobs"])

    @router.post(
        "/avatars/{avatar_id}/jobs",
        operation_id="create_job",
        status_code=202,
        response_model=Job,
        responses=problems(400, 404, 406, 413, 415, 422, 503, 507)
        | {200: {"model": Job, "description": "It was asked for before"}},
        openapi_extra={"requestBody": REQUEST},
    )
    async def create_job(
        avatar_id: AvatarIdPath, query: Annotated[ReposeQuery, Query()], request: Request, response: Response
    ) -> Job:
        """Repose as `POST /avatars/{id}/repose` does, but in the background; `Accept` names the format of the result.

        The same request again, with the same key, is the same job, and computes nothing twice.
        """
        order = await reposing.order(avatar_id, query, request, Times(), in_background=True)
        job, is_new = await jobs.add(order, request.state.principal.name)
        response.status_code = 202 if is_new else 200
        response.headers["Location"] = f"/jobs/{job.id}"
        return job

    async def seen(job_id: str, principal: Principal) -> Job:
        job = await to_thread.run_sync(jobs.store.get, job_id)
        if not may_see(job, principal):
            raise JobNotFound("there is no such job, or not any more")
        return job

    @router.get("/jobs", operation_id="list_jobs", responses=problems())
    async def list_jobs(request: Request) -> JobList:
        """The jobs of this key, those asked for last first; a key of the admin plane sees all."""
        found = await to_thread.run_sync(jobs.store.jobs)
        return JobList(jobs=[job for job in found if may_see(job, request.state.principal)])

    @router.get("/jobs/{job_id}", operation_id="get_job", responses=problems(404, 422))
    async def get_job(job_id: JobId, request: Request) -> Job:
        """How far a job is."""
        return await seen(job_id, request.state.principal)

    @router.delete("/jobs/{job_id}", operation_id="cancel_job", status_code=204, responses=problems(404, 422))
    async def cancel_job(job_id: JobId, request: Request) -> None:
        """Stop a job; one that has ended is removed with its result."""
        await seen(job_id, request.state.principal)
        await to_thread.run_sync(jobs.store.cancel, job_id)

    @router.get(
        "/jobs/{job_id}/result",
        operation_id="get_job_result",
        response_class=Response,
        responses=problems(404, 409, 422)
        | {200: {"content": {"application/octet-stream": _BINARY}, "headers": APPLIED_HEADERS}},
    )
    async def get_result(job_id: JobId, request: Request) -> Response:
        """What `repose` would have answered."""
        job = await seen(job_id, request.state.principal)
        if job.state in ("queued", "running"):
            raise JobNotFinished(f"{job.frames_done} of {job.frames} frames are done", frames_done=job.frames_done)
        if job.state != "done":
            raise JobFailed(f"the job is {job.state}: {job.error or 'it was not wanted any more'}", reason=job.error)
        return FileResponse(jobs.store.result(job_id), media_type=job.media_type, headers=job.applied)

    return router

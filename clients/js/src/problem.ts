/** Errors of the service: RFC 9457 problem details. */

/** The service refused, and said why.  `code` is stable; the rest is for people. */
export class Problem extends Error {
  override name = "Problem";

  constructor(
    readonly status: number,
    readonly code: string,
    readonly title: string,
    readonly detail?: string,
    /** Seconds to wait before trying again, where the service said so. */
    readonly retryAfterS?: number,
  ) {
    super(detail || title);
  }

  /** From an answer that is not 2xx; never throws. */
  static async from(answer: Response): Promise<Problem> {
    const body = await answer.json().catch(() => ({}));
    const retry = Number(answer.headers.get("retry-after") ?? NaN);
    return new Problem(
      answer.status,
      body.code ?? "unknown",
      body.title ?? `The service answered ${answer.status}`,
      body.detail,
      Number.isFinite(retry) ? retry : undefined,
    );
  }
}

"""The dashboard of the encoder: what callers feel, where the time goes, which version answers."""

from __future__ import annotations

from deployments.grafana.panels import HERE, Panel, Row, mean, quantile, rate

DOORS = 'route=~"/encode|/similarity|/rank|/v1/embeddings|/predict|/predict/similarity|/encode_batchable"'
DOOR_ERRORS = f'{HERE}, {DOORS}, code=~"5.."'

ROWS = (
    Row(
        "Now",
        (
            Panel(
                "Ready",
                "none",
                {"": f"min(ekiben_ready{{{HERE}}})"},
                "1: the last check found every worker's vectors right. 0: some server has no model, or a wrong one.",
                "stat",
                4,
                red_below=1,
                names={"0": "not ready", "1": "ready"},
            ),
            Panel(
                "Requests",
                "reqps",
                {"": rate("ekiben_requests_total", only=f"{HERE}, {DOORS}")},
                "Requests a second at the doors: the routes that embed texts.",
                "stat",
                4,
            ),
            Panel(
                "Errors",
                "percentunit",
                {
                    "": f"({rate('ekiben_requests_total', only=DOOR_ERRORS)} or vector(0)) / "
                    + rate("ekiben_requests_total", only=f"{HERE}, {DOORS}")
                },
                "Share of requests at the doors that end in a 5xx. The alert begins at 1 %.",
                "stat",
                4,
                red_from=0.01,
            ),
            Panel(
                "Slowest 1 %",
                "s",
                {"": quantile(0.99, "ekiben_request_seconds", "", f"{HERE}, {DOORS}")},
                "99 of 100 requests take less. The alert begins at 1 s.",
                "stat",
                4,
                red_from=1,
            ),
            Panel(
                "Live",
                "none",
                {"{{model}}": f"sum by (model) (ekiben_model_live{{{HERE}}} > 0)"},
                "The version that answers, and in how many workers. Two for a moment: a change is under way.",
                "stat",
                4,
            ),
            Panel(
                "Alerts",
                "none",
                {"": 'count(ALERTS{alertname=~"Ekiben.*", alertstate="firing"}) or vector(0)'},
                "Alerts of Ekiben that fire now; docs/monitoring.md says for each what to do.",
                "stat",
                4,
                red_from=1,
            ),
        ),
    ),
    Row(
        "Requests",
        (
            Panel(
                "Requests by route",
                "reqps",
                {"{{route}}": rate("ekiben_requests_total", "route")},
                "All routes, probes and /metrics included; paths that do not exist are /unknown.",
            ),
            Panel(
                "Answers that are no 200",
                "reqps",
                {"{{code}} {{route}}": rate("ekiben_requests_total", "code, route", f'{HERE}, code!="200"')},
                "4xx: what callers send. 409: they want another space. 429, 504: too much at once. 499: they left.",
            ),
            Panel(
                "Latency",
                "s",
                {
                    f"p{round(share * 100)}": quantile(share, "ekiben_request_seconds", "", f"{HERE}, {DOORS}")
                    for share in (0.5, 0.9, 0.99)
                },
                "From the end of the headers to the end of the answer, at the doors.",
                red_from=1,
            ),
            Panel(
                "Slowest 5 % by route",
                "s",
                {"{{route}}": quantile(0.95, "ekiben_request_seconds", "route", f"{HERE}, {DOORS}")},
                "95 of 100 requests of the route take less; bulk requests take longer than single texts.",
            ),
            Panel(
                "Texts and tokens",
                "cps",
                {"texts": rate("ekiben_texts_total"), "tokens": rate("ekiben_tokens_total")},
                "What was embedded a second, tokens before any were cut.",
            ),
            Panel(
                "Answers by version",
                "reqps",
                {"{{model}} in {{space}}": rate("ekiben_answers_total", "model, space")},
                "Who still asks for an old version or space, before it is taken away.",
            ),
        ),
    ),
    Row(
        "Where the time goes",
        (
            Panel(
                "Mean of each stage",
                "s",
                {"{{stage}}": mean("ekiben_stage_seconds", "stage")},
                "A value a turn (tokenize), a batch (queue, infer), an answer (respond): they do not add up.",
            ),
            Panel(
                "Slowest 1 % of waits",
                "s",
                {"{{lane}}": quantile(0.99, "ekiben_queue_seconds", "lane", HERE)},
                "How long texts wait until they are computed. Interactive must stay short while bulk works.",
            ),
            Panel(
                "Oldest text that waits",
                "s",
                {"{{lane}} {{instance}}": f"max by (lane, instance) (ekiben_queue_oldest_seconds{{{HERE}}})"},
                "Grows steadily: the lane stands still. The alert begins at 5 s.",
                red_from=5,
            ),
            Panel(
                "Texts that wait",
                "none",
                {"{{lane}}": f"sum by (lane) (ekiben_queue_texts{{{HERE}}})"},
                "In all servers together, by lane.",
            ),
            Panel(
                "Tokens that wait",
                "none",
                {"{{lane}}": f"sum by (lane) (ekiben_queue_tokens{{{HERE}}})"},
                "Beyond EKIBEN_QUEUE_TOKENS_INTERACTIVE or _BULK of a server, requests are answered 429.",
            ),
            Panel(
                "Batches",
                "none",
                {"texts": mean("ekiben_batch_texts"), "tokens": mean("ekiben_batch_tokens")},
                "Mean size of what is computed together: near 1 text on an idle server, larger under load.",
            ),
            Panel(
                "Padding",
                "percentunit",
                {
                    "wasted": f"{rate('ekiben_padding_tokens_total')} / "
                    f"({rate('ekiben_padding_tokens_total')} + {rate('ekiben_batch_tokens_sum')})"
                },
                "Share of the computed tokens that only fill texts up to the length of their batch mates.",
            ),
            Panel(
                "Spared by the cache",
                "percentunit",
                {
                    "found in the cache": f"{rate('ekiben_cache_hits_total')} / "
                    f"({rate('ekiben_cache_hits_total')} + {rate('ekiben_cache_misses_total')})",
                    "computed already for another": f"{rate('ekiben_deduplicated_texts_total')} / "
                    + rate("ekiben_texts_total"),
                },
                "Empty while EKIBEN_CACHE_MB is 0 and no text comes twice at once.",
            ),
            Panel(
                "Texts that were cut",
                "percentunit",
                {"cut": f"{rate('ekiben_truncated_texts_total')} / {rate('ekiben_texts_total')}"},
                "Longer than the model takes: what is behind the cut counts for nothing.",
                red_from=0.01,
            ),
        ),
    ),
    Row(
        "What is refused",
        (
            Panel(
                "Requests refused or given up",
                "reqps",
                {"{{reason}}": rate("ekiben_shed_total", "reason")},
                "requests, queue, wait: 429 by that limit. deadline: 504. Empty while there was none.",
            ),
            Panel(
                "Connections",
                "none",
                {"{{instance}}": f"sum by (instance) (ekiben_connections{{{HERE}}})"},
                "Open now; the limit is EKIBEN_MAX_CONNECTIONS a worker.",
            ),
            Panel(
                "Connections closed for what the client did",
                "cps",
                {"{{reason}}": rate("ekiben_connections_refused_total", "reason")},
                "Slow, broken or malicious clients, by what they did.",
            ),
        ),
    ),
    Row(
        "Versions",
        (
            Panel(
                "Workers by live version",
                "none",
                {"{{model}}": f"sum by (model) (ekiben_model_live{{{HERE}}})"},
                "A release: one line falls, another one rises, at once.",
            ),
            Panel(
                "Loads",
                "none",
                {"{{result}}": f"sum by (result) (increase(ekiben_swaps_total{{{HERE}}}[$__range]))"},
                "Versions that were to be brought to all workers in the time shown, and how that ended.",
                "stat",
            ),
            Panel(
                "Refused versions",
                "none",
                {"{{model}} {{instance}}": f"ekiben_version_refused{{{HERE}}} > 0"},
                "Failed their checks on that server; GET /models/info there says why. Empty is good.",
                "stat",
                red_from=1,
            ),
            Panel(
                "Since the alias was read",
                "s",
                {"{{instance}}": f"time() - (ekiben_follow_seen_timestamp_seconds{{{HERE}}} > 0)"},
                "Seconds since each server last read the alias that it follows. The alert begins at 300 s.",
                red_from=300,
            ),
            Panel(
                "Failures to follow",
                "none",
                {"{{instance}}": f"ekiben_follow_failures{{{HERE}}}"},
                "In a row: the alias could not be read, or its version not be fetched. The alert begins above 5.",
                red_from=6,
            ),
            Panel(
                "Threads replaced",
                "none",
                {"{{lane}} {{instance}}": f"increase(ekiben_lane_restarts_total{{{HERE}}}[$__range])"},
                "Threads that died or hung in the time shown: 0, or there is something in the log.",
                "stat",
                red_from=1,
            ),
            Panel(
                "Loaded versions",
                "none",
                {"": f"ekiben_model_info{{{HERE}}} == 1"},
                "Every version in memory, with run, space and precision.",
                "table",
                24,
            ),
        ),
    ),
)

"""The dashboard of the training line: whether it runs, what it released, and whether the servers follow."""

from __future__ import annotations

from deployments.grafana.panels import Panel, Row

NIGHTLY = 'flow="pipeline", deployment!=""'
ROWS = (
    Row(
        "Now",
        (
            Panel(
                "Sources",
                "none",
                {"{{source}}": "ekiben_line_up"},
                "Whether the exporter can ask Prefect and the registry; what it cannot ask is missing below.",
                "stat",
                4,
                red_below=1,
                names={"0": "down", "1": "up"},
            ),
            Panel(
                "Since the last good pipeline",
                "s",
                {
                    "{{deployment}}": f"time() - ekiben_line_last_success_timestamp_seconds{{{NIGHTLY}}}",
                },
                "The alert begins at 3 days.",
                "stat",
                5,
                red_from=3 * 86400,
            ),
            Panel(
                "Age of the champion",
                "s",
                {"": "time() - ekiben_line_champion_since_timestamp_seconds"},
                "Since it became the champion. Empty when its alias was moved by hand.",
                "stat",
                5,
            ),
            Panel(
                "Servers behind the champion",
                "none",
                {
                    "": 'count(ekiben_follow_info{alias="champion"} == 1 unless on (job, instance) '
                    "(ekiben_model_live > 0 and on (model) ekiben_line_champion_info == 1)) or vector(0)"
                },
                "Servers that follow `champion` and serve something else. After a release: for seconds only.",
                "stat",
                5,
                red_from=1,
            ),
            Panel(
                "Deployments whose last run failed",
                "none",
                {"": 'sum(ekiben_line_last_run_state{state=~"failed|crashed", deployment!=""}) or vector(0)'},
                "Failed or crashed; a release that its gates refused is not among them.",
                "stat",
                5,
                red_from=1,
            ),
        ),
    ),
    Row(
        "Runs",
        (
            Panel(
                "How the last runs ended",
                "none",
                {"{{flow}}/{{deployment}} {{state}}": "ekiben_line_last_run_state == 1"},
                "One entry a deployment; without a name behind the stroke: runs that somebody started by hand.",
                "table",
                12,
            ),
            Panel(
                "Ended within the last day",
                "none",
                {"{{flow}}/{{deployment}} {{state}}": "ekiben_line_ended_runs > 0"},
                "Runs that no other run has started, by state; refused: a gate said no.",
                width=12,
            ),
            Panel(
                "Duration of the last run",
                "s",
                {"{{flow}}/{{deployment}}": "ekiben_line_last_run_seconds"},
                "Grows with the data and with the trials of a study.",
            ),
            Panel(
                "Runs that have not ended",
                "none",
                {"{{state}}": "sum by (state) (ekiben_line_runs)"},
                "Scheduled ones are there for days ahead; none at all means that Prefect's scheduler is broken.",
            ),
            Panel(
                "Running for",
                "s",
                {"{{flow}}/{{deployment}}": "time() - ekiben_line_running_since_timestamp_seconds"},
                "The run that has been running longest. The alert begins at 6 hours.",
                red_from=6 * 3600,
            ),
            Panel(
                "Behind schedule",
                "s",
                {"{{flow}}/{{deployment}}": "ekiben_line_late_seconds"},
                "How far the run that is most behind is behind. The alert begins at 10 minutes.",
                red_from=600,
            ),
            Panel(
                "Last success",
                "s",
                {"{{flow}}/{{deployment}}": "time() - ekiben_line_last_success_timestamp_seconds"},
                "How long ago each deployment last did what it is for.",
            ),
            Panel(
                "Active schedules",
                "none",
                {"{{flow}}/{{deployment}}": "ekiben_line_deployment_schedules"},
                "0 also while the deployment is paused.",
            ),
        ),
    ),
    Row(
        "Champion",
        (
            Panel(
                "Champion",
                "none",
                {"": "ekiben_line_champion_info"},
                "The version that is in use, by the registry, with its run and space.",
                "table",
                12,
            ),
            Panel(
                "What the servers serve",
                "none",
                {"{{model}}": "sum by (model) (ekiben_model_live)"},
                "Workers by live version, in all servers.",
                width=12,
            ),
            Panel(
                "Releases, refusals, rollbacks",
                "none",
                {"{{kind}}": "sum by (kind) (ekiben_line_acts_total)"},
                "Entries of the history since its beginning.",
            ),
            Panel(
                "In the time shown",
                "none",
                {"{{kind}}": "sum by (kind) (increase(ekiben_line_acts_total[$__range]))"},
                "Many refusals and no release: the new data makes no better model, or a gate is too strict.",
                "stat",
            ),
            Panel(
                "Last of each kind",
                "s",
                {"{{kind}}": "time() - ekiben_line_last_act_timestamp_seconds"},
                "How long ago it was.",
                "stat",
            ),
        ),
    ),
    Row(
        "Workers",
        (
            Panel(
                "Workers",
                "none",
                {"{{pool}} {{status}}": "ekiben_line_workers"},
                "By pool; those that have ended stay offline for a while.",
            ),
            Panel(
                "Since a worker was heard",
                "s",
                {"{{pool}}": "time() - ekiben_line_worker_heartbeat_timestamp_seconds"},
                "The alert begins at 3 minutes.",
                red_from=180,
            ),
            Panel(
                "Pools",
                "none",
                {"{{pool}} {{status}}": "ekiben_line_pool_status == 1"},
                "Status of each work pool; not_ready: nobody polls it.",
                "stat",
            ),
            Panel(
                "Time that the exporter needs",
                "s",
                {"{{source}}": "ekiben_line_ask_seconds"},
                "For one look at Prefect, and at the registry.",
                width=12,
            ),
            Panel(
                "Since the source answered",
                "s",
                {"{{source}}": "time() - (ekiben_line_seen_timestamp_seconds > 0)"},
                "What was said more than 300 s ago is not shown any more.",
                width=12,
                red_from=300,
            ),
        ),
    ),
)

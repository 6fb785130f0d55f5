-- The latest finished run beside the one before it.
SELECT
    run_id,
    started_at,
    status,
    cells_done,
    cells_failed,
    round(success_rate, 4) AS success_rate,
    round(success_rate - lag(success_rate) OVER (ORDER BY started_at), 4) AS success_rate_change,
    recovered_cells,
    round(fault_seconds, 1) AS fault_seconds,
    round(audio_seconds_per_second, 1) AS audio_seconds_per_second,
    success_rate >= lag(success_rate) OVER (ORDER BY started_at) AS healthier
FROM (
    FROM robustness.runs
    WHERE ended_at IS NOT NULL AND success_rate IS NOT NULL
    ORDER BY started_at DESC
    LIMIT 2
)
ORDER BY started_at DESC;

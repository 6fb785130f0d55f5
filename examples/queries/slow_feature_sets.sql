-- Where the time goes: seconds of computing for a minute of audio, by feature set, over the
-- successful attempts of the last ten runs.
WITH recent AS (
    SELECT run_id FROM robustness.runs ORDER BY started_at DESC LIMIT 10
)
SELECT
    feature_set,
    count(*) AS attempts,
    round(60 * sum(duration_s) / nullif(sum(audio_s), 0), 3) AS seconds_per_minute_of_audio,
    round(quantile_cont(duration_s, 0.95), 2) AS p95_s,
    round(100 * sum(duration_s) / sum(sum(duration_s)) OVER (), 1) AS share_percent
FROM robustness.attempts
WHERE outcome = 'succeeded' AND run_id IN (FROM recent)
GROUP BY feature_set
ORDER BY sum(duration_s) DESC;

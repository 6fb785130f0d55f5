-- Where the time goes: seconds of computing for a minute of audio, by feature set, over the
-- successful attempts of the last ten runs. Decoding, which the first feature set of a file does
-- for all, is a line of its own.
WITH recent AS (
    SELECT run_id FROM robustness.runs ORDER BY started_at DESC LIMIT 10
),
succeeded AS (
    FROM robustness.attempts WHERE outcome = 'succeeded' AND run_id IN (FROM recent)
)
SELECT
    feature_set,
    count(*) AS attempts,
    round(60 * sum(seconds) / nullif(sum(audio_s), 0), 3) AS seconds_per_minute_of_audio,
    round(quantile_cont(seconds, 0.95), 2) AS p95_s,
    round(100 * sum(seconds) / sum(sum(seconds)) OVER (), 1) AS share_percent
FROM (
    SELECT feature_set, audio_s, duration_s - coalesce(decode_s, 0) AS seconds FROM succeeded
    UNION ALL
    SELECT 'decode', audio_s, decode_s FROM succeeded WHERE decode_s IS NOT NULL
)
GROUP BY feature_set
ORDER BY sum(seconds) DESC;

-- What failed in the day up to the last run's end: the files that are there, which feature sets
-- failed and why, and whether a later attempt succeeded.
WITH latest AS (
    SELECT max(coalesce(ended_at, started_at)) - INTERVAL 24 HOUR AS since FROM robustness.runs
)
SELECT
    attempts.file_key,
    attempts.error_type,
    attempts.message,
    list(DISTINCT attempts.feature_set ORDER BY attempts.feature_set) AS feature_sets,
    bool_and(missing.file_key IS NULL) AS succeeded_later,
    max(attempts.started_at) AS last_failed
FROM robustness.attempts
CROSS JOIN latest
JOIN features.tracks USING (file_key)
LEFT JOIN features.missing USING (file_key, feature_set)
WHERE attempts.outcome = 'failed' AND attempts.started_at >= latest.since
GROUP BY ALL
ORDER BY succeeded_later, last_failed DESC, attempts.file_key;

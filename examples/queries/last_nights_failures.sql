-- What failed in the day up to the last run's end: the files that are there, why, how many attempts
-- failed, and which feature sets are still missing. What failed before, and was not tried again, is
-- in failing_files.sql.
WITH latest AS (
    SELECT max(coalesce(ended_at, started_at)) - INTERVAL 24 HOUR AS since FROM robustness.runs
),
failed AS (
    SELECT
        file_key,
        arg_max(error_type, row_id) AS error_type,
        arg_max(message, row_id) AS message,
        count(*) AS failed_attempts,
        max(started_at) AS last_failed
    FROM robustness.attempts, latest
    WHERE outcome = 'failed' AND started_at >= since
    GROUP BY file_key
),
missing AS (
    SELECT
        file_key,
        arg_max(error_type, last_attempt) AS error_type,
        arg_max(reason, last_attempt) AS reason,
        list(feature_set ORDER BY feature_set) AS feature_sets
    FROM features.missing
    GROUP BY file_key
)
SELECT
    failed.* REPLACE (
        coalesce(missing.error_type, failed.error_type) AS error_type,
        coalesce(missing.reason, failed.message) AS message
    ),
    coalesce(missing.feature_sets, []) AS still_missing
FROM failed
JOIN features.tracks USING (file_key)
LEFT JOIN missing USING (file_key)
ORDER BY len(still_missing) DESC, last_failed DESC, file_key;

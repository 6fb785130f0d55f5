-- Which files have cells missing, which ones, and why.
SELECT
    file_key,
    reason,
    any_value(error_type) AS error_type,
    list(feature_set ORDER BY feature_set) AS feature_sets,
    min(since) AS since,
    max(last_attempt) AS last_attempt
FROM features.missing
GROUP BY file_key, reason
ORDER BY len(feature_sets) DESC, file_key, reason;

-- Tempi that are rather wrong than right, the most doubtful first, and what each may be instead.
SELECT
    file_key,
    round(bpm, 1) AS bpm,
    round(bpm_second, 1) AS or_rather,
    round(100 * bpm_confidence) AS right_percent
FROM features.rhythm
SEMI JOIN features.tracks USING (file_key)
WHERE bpm_confidence < 0.5
ORDER BY bpm_confidence, file_key;

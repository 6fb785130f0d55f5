-- Tracks much louder or softer than the library, or clipping: from the median loudness by more
-- than three times the median absolute deviation, scaled to match a standard deviation (1.4826).
WITH library AS (
    SELECT median(integrated_lufs) AS usual_lufs, mad(integrated_lufs) * 1.4826 AS spread_lu
    FROM features.tracks
)
SELECT
    file_key,
    round(integrated_lufs, 1) AS integrated_lufs,
    round(integrated_lufs - usual_lufs, 1) AS above_usual_lu,
    round(true_peak_dbtp, 1) AS true_peak_dbtp
FROM features.tracks, library
WHERE abs(integrated_lufs - usual_lufs) > 3 * spread_lu OR true_peak_dbtp > 0
ORDER BY abs(integrated_lufs - usual_lufs) DESC, file_key;

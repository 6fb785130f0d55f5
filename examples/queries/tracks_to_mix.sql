-- Pairs of tracks that mix well: the same or a neighbouring place on the Camelot wheel, and
-- tempos within 3 %. The closest tempos come first. Of files with the same content, one is shown.
WITH mixable AS (
    SELECT
        file_key,
        coalesce(title, file_key) AS track,
        bpm,
        camelot,
        camelot[:-2]::INTEGER AS hour,
        camelot[-1] AS letter
    FROM features.tracks
    WHERE bpm > 0 AND camelot IS NOT NULL
    QUALIFY row_number() OVER (PARTITION BY content_hash ORDER BY file_key) = 1
)
SELECT
    a.track,
    b.track AS mixes_with,
    a.camelot,
    b.camelot AS other_camelot,
    round(a.bpm, 1) AS bpm,
    round(b.bpm, 1) AS other_bpm,
    round(100 * (b.bpm / a.bpm - 1), 2) AS tempo_change_percent
FROM mixable AS a
JOIN mixable AS b
    ON a.file_key < b.file_key
    AND abs(b.bpm / a.bpm - 1) <= 0.03
    AND (
        (a.hour = b.hour)
        OR (a.letter = b.letter AND (a.hour - b.hour + 12) % 12 IN (1, 11))
    )
ORDER BY abs(b.bpm / a.bpm - 1), a.track, b.track
LIMIT 100;

-- Pairs of tracks that mix well: the same or a neighbouring place on the Camelot wheel, and
-- tempos within 3 %. The closest tempos come first.
WITH mixable AS (
    SELECT
        tracks.file_key,
        coalesce(tracks.title, tracks.file_key) AS track,
        rhythm.bpm,
        key.camelot,
        key.camelot[:-2]::INTEGER AS hour,
        key.camelot[-1] AS letter
    FROM features.tracks
    JOIN features.rhythm USING (file_key)
    JOIN features.key USING (file_key)
    WHERE NOT tracks.gone AND rhythm.bpm > 0 AND key.camelot IS NOT NULL
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
